"""Trained weights from a file: safetensors, or what `torch.save` wrote of a state dict."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

WRAPPERS = ("module", "state_dict", "model")
"""Keys under which checkpoints keep the state dict: the cache of dense networks, Lightning, torchvision."""

PREFIX = "module."
"""What a DistributedDataParallel puts before every name."""


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Fill `model` in place with the weights in `path`: all of them, and no others.

    The file holds a state dict, or a checkpoint with one under a key of WRAPPERS; names may begin with PREFIX. It is
    read without running code of it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or its names or shapes are not those of the model.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of weights {path}")
    try:
        is_safe = path.suffix == ".safetensors"
        read: Any = load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling damaged bytes can raise anything
        raise ValueError(f"the weights {path} cannot be read ({type(error).__name__}: {error})") from error
    wanted = model.state_dict()
    given = _state(read, path)
    if given and all(name.startswith(PREFIX) for name in given) and not given.keys() & wanted.keys():
        given = {name.removeprefix(PREFIX): value for name, value in given.items()}
    missing, unknown = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    if missing or unknown:
        lists = (("without", missing), ("with unknown", unknown))
        what = " and ".join(f"{word} {names[0]!r} ({len(names)} such)" for word, names in lists if names)
        raise ValueError(f"the weights {path} are not those of the model: {what}")
    for name, value in wanted.items():
        if given[name].shape != value.shape:
            raise ValueError(
                f"the weights {path} are not those of the model: {name!r} has shape {tuple(given[name].shape)} "
                f"there and {tuple(value.shape)} in the model"
            )
    model.load_state_dict(given)


def _state(read: Any, path: Path) -> dict[str, Tensor]:
    """The state dict of a file's content."""
    found = read
    for key in WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"the weights {path} must be a state dict of tensors, or have one under one of {WRAPPERS}")
    return {str(name): value for name, value in found.items()}
