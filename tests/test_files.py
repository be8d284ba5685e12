"""Files that are replaced whole or not at all."""

import os
import resource
from pathlib import Path

import pytest
import torch

from nas_gate.files import replacing, write_text


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with replacing(path) as file:
        file.write(b"good")

    def broken() -> None:
        with replacing(path) as file:
            file.write(b"ba")
            raise RuntimeError("half")

    with pytest.raises(RuntimeError, match="half"):
        broken()
    assert path.read_bytes() == b"good"
    assert os.listdir(path.parent) == ["file"]


def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    write_text(path, "before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))  # writing more is an error, as on a full disk
    try:
        with pytest.raises(OSError, match="File too large"), replacing(path) as file:
            torch.save({"weight": torch.zeros(1000)}, file)
        with pytest.raises(OSError, match="File too large"):
            write_text(path, "x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["c.pt"]


def test_text_is_written_as_utf_8(tmp_path: Path) -> None:
    write_text(tmp_path / "text", "± 1\n")
    assert (tmp_path / "text").read_bytes() == b"\xc2\xb1 1\n"
