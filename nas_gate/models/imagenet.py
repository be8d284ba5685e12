"""Torchvision's classifiers by torchvision's names, with pretrained weights and a stem for small images."""

import difflib
from collections.abc import Mapping
from functools import cache
from http.client import HTTPException
from typing import Any, Literal

import torch
import torchvision.models as zoo
from torch import nn

Stem = Literal["imagenet", "cifar"]

# The families for which small images customarily go through a 3x3 convolution of stride 1 with no pooling
# after it, as in He et al. (2015, section 4.2): name prefix -> the pooling layer that is taken out.
CIFAR_STEMS: dict[str, str | None] = {
    "resnet": "maxpool",
    "resnext": "maxpool",
    "wide_resnet": "maxpool",
    "densenet": "features.pool0",
    "shufflenet": "maxpool",
    "mobilenet": None,
    "mnasnet": None,
    "efficientnet": None,
    "regnet": None,
    "convnext": None,
}

# The heads beside the final classifier that predict the classes too.
_AUXILIARY_HEADS = {"googlenet": ("aux1.fc2", "aux2.fc2"), "inception_v3": ("AuxLogits.fc",)}


@cache
def names() -> tuple[str, ...]:
    """The names of torchvision's image classifiers."""
    return tuple(zoo.list_models(module=zoo))


def classifier(
    name: str,
    /,
    *,
    num_classes: int | None = None,
    in_channels: int = 3,
    weights: str | None = None,
    stem: Stem = "imagenet",
    **builder_arguments: Any,
) -> nn.Module:
    """The torchvision classifier called `name`: (N, in_channels, H, W) -> (N, num_classes).

    Args:
        name: one of `names()`.
        num_classes: outputs; None keeps the builder's own number (1000). With `weights` and another number
            than theirs, all weights are loaded and the final layer is replaced by a fresh one.
        in_channels: channels of the images. Another number than 3 makes a fresh first convolution; it cannot
            be combined with `weights`.
        weights: None for random initialisation; "DEFAULT" or the name of one of the model's weights (such as
            "IMAGENET1K_V1") for pretrained ones, which torchvision downloads once into its cache.
        stem: "cifar" makes the first convolution 3x3 with stride 1 and takes out the pooling after it, for
            the families in `CIFAR_STEMS`. Where that convolution was 3x3 already it keeps its weights.
        builder_arguments: further keywords of torchvision's builder. `aux_logits` is False unless given, so
            that the model returns one tensor.

    Raises:
        ValueError: a value that is not possible; RuntimeError: the weights could not be had or did not fit.
    """
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"model {name!r}: num_classes must be at least 1, but got {num_classes}")
    if in_channels < 1:
        raise ValueError(f"model {name!r}: in_channels must be at least 1, but got {in_channels}")
    if weights is not None and in_channels != 3:
        raise ValueError(f"model {name!r}: weights={weights!r} need in_channels=3, but got {in_channels}")
    if stem not in ("imagenet", "cifar"):
        raise ValueError(f'model {name!r}: stem must be "imagenet" or "cifar", but got {stem!r}')
    pool = CIFAR_STEMS[_cifar_family(name)] if stem == "cifar" else None

    model: nn.Module
    if weights is not None:
        model = _pretrained(name, _find_weights(name, weights), num_classes, builder_arguments)
    else:
        arguments = {**_quiet(name), **builder_arguments}
        if num_classes is not None:
            arguments["num_classes"] = num_classes
        model = zoo.get_model(name, weights=None, **arguments)
    if stem == "cifar" or in_channels != 3:
        _replace_stem(model, in_channels, cifar=stem == "cifar")
    if pool is not None:
        model.set_submodule(pool, nn.Identity())
    return model


def without_weights(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of `classifier` that build the architecture of `arguments` with random weights."""
    plain = dict(arguments)
    weights = plain.pop("weights", None)
    if weights is None:
        return plain
    found = _find_weights(name, weights)
    if plain.get("num_classes") is None:
        plain["num_classes"] = len(found.meta["categories"])
    # What torchvision's builders set along with the weights.
    if name in _AUXILIARY_HEADS:
        plain.setdefault("transform_input", True)
    if name.startswith("vit"):
        plain.setdefault("image_size", found.meta["min_size"][0])
    return plain


def _quiet(name: str) -> dict[str, Any]:
    """One output tensor, and the initialisation stated, which torchvision otherwise warns about."""
    return {"aux_logits": False, "init_weights": True} if name in _AUXILIARY_HEADS else {}


def _cifar_family(name: str) -> str:
    family = next((family for family in CIFAR_STEMS if name.startswith(family)), None)
    if family is None:
        raise ValueError(
            f"model {name!r}: stem='cifar' is there for the families {', '.join(CIFAR_STEMS)}; "
            "made for small images are cifar_vgg16_bn, cifar_mobilenet_v2, densenet40, resnet20 to resnet110"
        )
    return family


def _find_weights(name: str, weights: str) -> Any:
    enum = zoo.get_model_weights(name)
    members = enum.__members__  # aliases such as DEFAULT included
    key = str(weights).removeprefix(f"{enum.__name__}.")
    if key not in members:
        close = difflib.get_close_matches(key, members, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"model {name!r}: unknown weights {weights!r}{hint}; valid are None, {', '.join(members)}")
    return members[key]


def _pretrained(name: str, weights: Any, num_classes: int | None, arguments: dict[str, Any]) -> Any:
    # Torchvision's builder takes the auxiliary heads along with the weights, then drops them if they were not
    # asked for; it refuses an explicit False, and only inception_v3 asks for them by default.
    arguments = dict(arguments)
    auxiliary = name not in _AUXILIARY_HEADS or arguments.get("aux_logits", False)
    if not auxiliary:
        arguments.pop("aux_logits", None)
    try:
        model: Any = zoo.get_model(name, weights=weights, **arguments)
    except (OSError, EOFError, HTTPException, RuntimeError) as error:
        raise RuntimeError(
            f"model {name!r}: weights {weights.name} could not be loaded from {weights.url}: {error}. Put "
            f"that file into {torch.hub.get_dir()}/checkpoints, or use weights=None"
        ) from error
    if not auxiliary and name == "inception_v3":
        model.aux_logits = False
        model.AuxLogits = None
    if num_classes is not None and num_classes != len(weights.meta["categories"]):
        _replace_heads(name, model, num_classes)
    return model


def _replace_heads(name: str, model: Any, num_classes: int) -> None:
    # In all of torchvision's classifiers the last linear layer or convolution is the final classifier.
    layers = [path for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    heads = layers[-1:]
    children = dict(model.named_children())
    heads += [path for path in _AUXILIARY_HEADS.get(name, ()) if path.split(".")[0] in children]
    for path in heads:
        old = model.get_submodule(path)
        bias = old.bias is not None
        if isinstance(old, nn.Linear):
            new: nn.Module = nn.Linear(old.in_features, num_classes, bias=bias)
        else:
            new = nn.Conv2d(old.in_channels, num_classes, old.kernel_size, bias=bias)
        model.set_submodule(path, new)


def _replace_stem(model: Any, in_channels: int, *, cifar: bool) -> None:
    # In all of torchvision's classifiers the first convolution is the one that reads the image.
    path = next(path for path, module in model.named_modules() if isinstance(module, nn.Conv2d))
    old = model.get_submodule(path)
    if cifar and old.in_channels == in_channels and old.kernel_size == (3, 3):
        old.stride = (1, 1)
        return
    kernel, stride, padding = (3, 1, 1) if cifar else (old.kernel_size, old.stride, old.padding)
    new = nn.Conv2d(in_channels, old.out_channels, kernel, stride, padding, bias=old.bias is not None)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    model.set_submodule(path, new)
