"""Code of the user's own, by import path: "package.module:factory"."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def is_import_path(name: str) -> bool:
    """Whether a name is an import path, not one of a registry."""
    return ":" in name


def imported(path: str, what: str) -> Callable[..., Any]:
    """The callable that an import path leads to: a function, a class, or a dotted attribute of a module.

    This imports and runs that code. `what` says in errors what it is a factory of, as "model". Raises ValueError for
    what is no import path, ImportError where it leads nowhere, TypeError where to something that cannot be called.
    """
    module_name, _, attributes = path.partition(":")
    parts = attributes.split(".")
    if not all(module_name.split(".")) or not all(parts):
        raise ValueError(f'{what} {path!r}: an import path must read "package.module:factory"')
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise ImportError(
            f"{what} {path!r}: cannot import module {module_name!r} ({error}); "
            "it must be installed, or its folder must be on PYTHONPATH"
        ) from error
    for index, part in enumerate(parts):
        if not hasattr(found, part):
            owner = ".".join([module_name, *parts[:index]])
            close = difflib.get_close_matches(part, dir(found), n=3)
            hint = f"; close matches: {', '.join(close)}" if close else ""
            raise ImportError(f"{what} {path!r}: {owner!r} has no attribute {part!r}{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"{what} {path!r}: the factory must be callable, but is {type(found)}")
    factory: Callable[..., Any] = found
    return factory


def source_digest(path: str) -> str:
    """A digest of the files that an import path leads to: its module's, and that of a factory imported from elsewhere.

    Empty where there is none.
    """
    return _digest([importlib.import_module(path.partition(":")[0]), inspect.unwrap(imported(path, "code"))])


def modules_digest(model: nn.Module) -> str:
    """A digest of the files that the classes of a model's modules are defined in, but PyTorch's."""
    kinds = {type(module) for module in model.modules() if not type(module).__module__.startswith("torch.")}
    return _digest(sorted(kinds, key=lambda kind: (kind.__module__, kind.__qualname__)))


def _digest(objects: Iterable[Any]) -> str:
    files: dict[str, None] = {}
    for each in objects:
        with suppress(TypeError):  # an object that was built, or a class of C code
            files[inspect.getsourcefile(each) or ""] = None
    contents = [Path(file).read_bytes() for file in files if file and Path(file).is_file()]
    return hashlib.sha256(b"".join(contents)).hexdigest() if contents else ""
