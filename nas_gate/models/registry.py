"""The names of models and what they build; all but imported ones take `num_classes` and `in_channels`."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from nas_gate.import_paths import imported, is_import_path
from nas_gate.models import cifar, digits, imagenet, shapes

Builder = Callable[..., nn.Module]

BUILDERS: dict[str, Builder] = {
    "digits_cnn": digits.digits_cnn,
    "shapes_fcn": shapes.shapes_fcn,
    "resnet20": partial(cifar.resnet, 20),
    "resnet32": partial(cifar.resnet, 32),
    "resnet44": partial(cifar.resnet, 44),
    "resnet56": partial(cifar.resnet, 56),
    "resnet110": partial(cifar.resnet, 110),
    "cifar_vgg16_bn": cifar.vgg16_bn,
    "densenet40": cifar.densenet40,
    "cifar_mobilenet_v2": cifar.mobilenet_v2,
    "cifar_supernet": cifar.supernet,
    **{name: partial(imagenet.classifier, name) for name in imagenet.names()},
}


def names() -> list[str]:
    """Every registered name, sorted; `build` also takes import paths, "package.module:factory"."""
    return sorted(BUILDERS)


def build(name: str, **arguments: Any) -> nn.Module:
    """The model called `name`, made with `arguments`.

    Args:
        name: one of `names()`, or "package.module:factory": a callable of an importable module (a function, a
            class, or a dotted attribute) that returns an `nn.Module`. Such a path imports and runs that code.
        arguments: keywords of the builder, e.g. num_classes, in_channels; `accepts` tells which it names.

    Raises:
        ValueError: the name is unknown (the error lists the valid ones), or the builder refuses a value.
        ImportError: the module or the attribute of an import path cannot be had.
        TypeError: an argument that the builder does not take, or a factory that returned no `nn.Module`.
    """
    builder = _resolve(name)
    signature = _signature(builder)
    if signature is not None:
        try:
            signature.bind(**arguments)
        except TypeError as error:
            raise TypeError(f"model {name!r}: {error}; its arguments are {signature}") from error
    model: Any = builder(**arguments)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model {name!r}: the factory must return an nn.Module, but returned {type(model)}")
    return model


def accepts(name: str, keyword: str) -> bool:
    """Whether the builder called `name` has a parameter named `keyword`; raises as `build` does for the name.

    Only parameters that the signature names count: what a factory does with `**kwargs` cannot be known.
    """
    signature = _signature(_resolve(name))
    parameter = signature.parameters.get(keyword) if signature is not None else None
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return parameter is not None and parameter.kind in kinds


def without_weights(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that build the same architecture as `arguments` do, but fetch no pretrained weights.

    For a torchvision name: `weights` is taken out, and what those weights had set (the number of classes, the
    input transform, the image size) is put in. For any other name the arguments are returned as they are.
    """
    return imagenet.without_weights(name, arguments) if name in imagenet.names() else dict(arguments)


def natural_input(name: str, arguments: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """(channels, height, width) of the images that a registered model was made for; None for a factory of your own."""
    if name not in BUILDERS:
        return None
    if name == "digits_cnn":
        channels, side = 1, 8
    elif name in imagenet.names() and arguments.get("stem") != "cifar":
        channels, side = 3, arguments.get("image_size", 299 if name == "inception_v3" else 224)
    else:
        channels, side = 3, 32
    return arguments.get("in_channels", channels), side, side


def _resolve(name: str) -> Builder:
    if name in BUILDERS:
        return BUILDERS[name]
    if is_import_path(name):
        return imported(name, "model")
    close = difflib.get_close_matches(name, BUILDERS, n=5, cutoff=0.6)
    hint = f"close matches: {', '.join(close)}; " if close else ""
    raise ValueError(
        f"unknown model {name!r}; {hint}valid names: {', '.join(names())}, "
        'or "package.module:factory" for a factory of your own'
    )


def _signature(builder: Builder) -> inspect.Signature | None:
    try:
        return inspect.signature(builder)
    except ValueError:  # callables of extension modules may have none, and judge their arguments themselves
        return None
