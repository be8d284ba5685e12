"""The sets by name, and `load`, which turns a name and plain arguments into three loaders."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from nas_gate.data import sources
from nas_gate.data.augment import Augment, StreamAugment
from nas_gate.data.loaders import Loader, StreamLoader, TensorLoader
from nas_gate.data.schedule import stratified_split
from nas_gate.data.sources import Arrays, Folders

# The usual ImageNet statistics, in units of 0 to 255, which published weights expect.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)

AnyAugment: TypeAlias = Augment | StreamAugment


@dataclass(frozen=True)
class Data:
    """A data set, ready for training.

    Attributes:
        train: shuffled and augmented; a smaller last batch is left out (batch norm fails on one image).
        validation: held out of the training part; neither shuffled nor augmented.
        test: neither shuffled nor augmented.
        num_classes: labels are 0 .. num_classes - 1; None where targets are no classes.
        in_channels: channels of an image.
        image_size: (h, w), pixels.
        mean: per channel; batches are (x - mean) / std with x as the set holds it, for images 0 to 255.
        std: per channel.
        name: as in `NAMES`.
        sizes: images in "train", "validation" and "test".
        fingerprint: 16 hex digits that change with anything that the batches depend on: contents (of streamed
            sets: files' names, labels and sizes, not their pixels), split, seed, batch size, augmentation.
    """

    train: Loader
    validation: Loader
    test: Loader
    num_classes: int | None
    in_channels: int
    image_size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]
    name: str
    sizes: Mapping[str, int]
    fingerprint: str


@dataclass(frozen=True)
class Source:
    """How a named set is read, its own augmentation, and the arguments that only it takes."""

    read: Callable[..., Arrays | Folders]
    augment: AnyAugment
    reading: tuple[str, ...] = ()
    streaming: tuple[str, ...] = ()


_SIZES = ("image_size", "resize")

NAMES: Mapping[str, Source] = {
    "digits": Source(sources.digits, Augment(crop=1)),
    "cifar10": Source(sources.torchvision_set("CIFAR10", 10), Augment(crop=4, flip=True)),
    "cifar100": Source(sources.torchvision_set("CIFAR100", 100), Augment(crop=4, flip=True)),
    "fashion_mnist": Source(sources.torchvision_set("FashionMNIST", 10), Augment(crop=2, flip=True)),
    "mnist": Source(sources.torchvision_set("MNIST", 10), Augment(crop=2)),
    "svhn": Source(sources.torchvision_set("SVHN", 10), Augment(crop=4)),
    "image_folder": Source(sources.image_folder, StreamAugment(), streaming=_SIZES),
    "imagenet": Source(sources.imagenet, StreamAugment(), streaming=_SIZES),
    "shapes": Source(sources.shapes, Augment()),
    "npz": Source(sources.npz, Augment(), reading=("path", "num_classes")),
}


def load(
    name: str = "digits",
    *,
    root: str | Path | None = None,
    batch_size: int = 128,
    validation: float = 0.1,
    seed: int = 0,
    augment: str | Mapping[str, Any] | None = "default",
    download: bool = False,
    workers: int = 4,
    **arguments: Any,
) -> Data:
    """The data set `name` as three loaders.

    Args:
        name: one of `NAMES`.
        root: folder of the data; None for the environment variable NAS_GATE_DATA. Digits and shapes need none.
        batch_size: images per step, over all ranks.
        validation: share of the training part that is held out, of every class of images alike; in (0, 1).
        seed: of the held-out split, the order and the augmentation. The test part does not depend on it.
        augment: "default" for the set's own, "none" or None for none, or a mapping of parameters: crop, flip,
            cutout for sets in memory (`Augment`), scale, flip for streamed ones (`StreamAugment`).
        download: let torchvision fetch what is missing.
        workers: processes that read a streamed set; 0 for none. Sets in memory need none.
        **arguments: for npz `path` and `num_classes` (see `sources.npz`); for image_folder and imagenet
            `image_size` (224), the side of the square images given, and `resize` (image_size * 8 / 7), the
            shorter side before the centre is cut out for evaluation.

    Raises:
        FileNotFoundError: the data is not there; says which path was tried and how to set it.
        ValueError: an unknown name or argument, or a value or a file that breaks a rule.
    """
    if name not in NAMES:
        raise ValueError(f"There is no data set {name!r}; valid names: {', '.join(NAMES)}.")
    source = NAMES[name]
    takes = source.reading + source.streaming
    if unknown := sorted(arguments.keys() - set(takes)):
        raise ValueError(f"{name} takes no argument {unknown[0]!r}; its own are: {', '.join(takes) or 'none'}.")
    # Checked again where they are used, but reading the data may take minutes.
    if isinstance(validation, bool) or not isinstance(validation, (int, float)) or not 0 < validation < 1:
        raise ValueError(f"`0 < validation < 1` must hold, but got {validation!r}.")
    for key, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0), ("seed", seed, 0)):
        _check_whole(key, value, least)
    for key in ("image_size", "resize", "num_classes"):
        if arguments.get(key) is not None:
            _check_whole(key, arguments[key], 1)
    if not isinstance(download, bool):
        raise ValueError(f"`download` must be true or false, but got {download!r}.")
    for key, place in (("root", root), ("path", arguments.get("path"))):
        if place is not None and not isinstance(place, (str, os.PathLike)):
            raise ValueError(f"`{key}` must be the name of a file or folder, but got {place!r}.")
    chosen = _chosen_augment(name, source.augment, augment)

    root = root or os.environ.get(sources.ROOT_VARIABLE) or None
    folder = Path(root).expanduser() if root is not None else None
    reading = {key: arguments[key] for key in source.reading if arguments.get(key) is not None}
    streaming = {key: arguments[key] for key in source.streaming if arguments.get(key) is not None}
    if source.streaming:
        transforms = _transforms(chosen, **streaming)
    content = source.read(folder, download, **reading)

    settings = ("1", name, batch_size, validation, seed, chosen, sorted(streaming.items()))
    if isinstance(content, Arrays):
        return _in_memory(name, content, settings, batch_size, validation, seed, chosen)
    return _streamed(name, content, settings, batch_size, validation, seed, transforms, workers)


def _check_whole(key: str, value: object, least: int) -> None:
    if type(value) is not int or value < least:
        raise ValueError(f"`{key}` must be a whole number >= {least}, but got {value!r}.")


def _chosen_augment(name: str, default: AnyAugment, wanted: str | Mapping[str, Any] | None) -> AnyAugment | None:
    if wanted == "default":
        return default
    if wanted is None or wanted == "none":
        return None
    valid = [field.name for field in fields(default)]
    if not isinstance(wanted, Mapping):
        raise ValueError(f"`augment` must be 'default', 'none' or a mapping of {', '.join(valid)}, but got {wanted!r}.")
    if unknown := sorted(map(str, wanted.keys() - set(valid))):
        raise ValueError(f"{name} has no augmentation {unknown[0]!r}; valid ones: {', '.join(valid)}.")
    return type(default)(**wanted)


def channel_statistics(x: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of N x C x H x W, in the units of x; a deviation of 0 gives 1.

    In float64, and in pieces that fit a cache: a large uint8 set is never copied whole.
    """
    pixels = x[:, 0].numel()
    pieces = torch.split(x, 256)
    mean = torch.stack([piece.double().sum((0, 2, 3)) for piece in pieces]).sum(0) / pixels
    squares = [piece.double().sub_(mean[:, None, None]).square_().sum((0, 2, 3)) for piece in pieces]
    std = (torch.stack(squares).sum(0) / pixels).sqrt()
    return mean.tolist(), torch.where(std > 0, std, 1.0).tolist()


def _fingerprint(key: object, *contents: bytes | Tensor) -> str:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8)
    for content in contents:
        if isinstance(content, Tensor):
            # masks as the int64 that batches give, in pieces, for that takes eight times as much memory
            kind = torch.int64 if content.dtype == torch.uint8 and content.dim() == 3 else content.dtype
            digest.update(f"{kind}{tuple(content.shape)}".encode())
            for piece in torch.split(content, 256):
                digest.update(piece.to(kind).contiguous().numpy().data)
        else:
            digest.update(content)
    return digest.hexdigest()


def _in_memory(
    name: str,
    arrays: Arrays,
    settings: tuple[object, ...],
    batch_size: int,
    validation: float,
    seed: int,
    augment: AnyAugment | None,
) -> Data:
    by_class = arrays.y_train.dim() == 1 and not arrays.y_train.is_floating_point()
    alike = torch.zeros(len(arrays.y_train), dtype=torch.int64)
    rest, held = stratified_split(arrays.y_train if by_class else alike, validation, seed)
    x, y = arrays.x_train[rest], arrays.y_train[rest]
    mean, std = channel_statistics(x)
    plain: dict[str, Any] = {"batch_size": batch_size, "mean": mean, "std": std}
    assert not isinstance(augment, StreamAugment)
    train = TensorLoader(x, y, **plain, shuffle=True, augment=augment, seed=seed, drop_last=True)
    return Data(
        train=train,
        validation=TensorLoader(arrays.x_train[held], arrays.y_train[held], **plain),
        test=TensorLoader(arrays.x_test, arrays.y_test, **plain),
        num_classes=arrays.num_classes,
        in_channels=x.shape[1],
        image_size=train.image_size,
        mean=mean,
        std=std,
        name=name,
        sizes={"train": len(rest), "validation": len(held), "test": len(arrays.y_test)},
        fingerprint=_fingerprint(
            (*settings, arrays.num_classes), arrays.x_train, arrays.y_train, arrays.x_test, arrays.y_test
        ),
    )


def _transforms(
    augment: AnyAugment | None, image_size: int = 224, resize: int | None = None
) -> tuple[int, Callable[[Any], Tensor], Callable[[Any], Tensor]]:
    """The image size, and image -> uint8 tensor for training and for evaluation."""
    from torchvision.transforms import v2

    resize = image_size * 8 // 7 if resize is None else resize
    if resize < image_size:
        raise ValueError(f"`image_size <= resize` must hold, but got image_size={image_size}, resize={resize}.")
    plain = v2.Compose([v2.Resize(resize), v2.CenterCrop(image_size), v2.PILToTensor()])
    if augment is None:
        return image_size, plain, plain
    assert isinstance(augment, StreamAugment)
    part = v2.RandomResizedCrop(image_size, scale=(augment.scale, 1.0))
    mirror = v2.RandomHorizontalFlip(0.5 if augment.flip else 0.0)
    return image_size, v2.Compose([part, mirror, v2.PILToTensor()]), plain


def _listing(samples: Sequence[tuple[str, int]]) -> list[tuple[str, int, int]]:
    """Name, label and size in bytes of files; ValueError naming one that is empty.

    Names are without their root: a set that moved is the same set.
    """
    listing = []
    for path, label in samples:
        size = os.stat(path).st_size
        if size == 0:
            raise ValueError(f"{path}: an image file must not be empty, but this one has 0 bytes.")
        listing.append(("/".join(Path(path).parts[-2:]), label, size))
    return listing


def _streamed(
    name: str,
    folders: Folders,
    settings: tuple[object, ...],
    batch_size: int,
    validation: float,
    seed: int,
    transforms: tuple[int, Callable[[Any], Tensor], Callable[[Any], Tensor]],
    workers: int,
) -> Data:
    side, augmented, plain = transforms
    listing = _listing([*folders.train, *folders.test])
    rest, held = stratified_split(torch.tensor([label for _, label in folders.train]), validation, seed)
    read = folders.read
    every: dict[str, Any] = {
        "batch_size": batch_size,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "workers": workers,
    }
    train = [folders.train[i] for i in rest.tolist()]
    return Data(
        train=StreamLoader(train, read, augmented, **every, shuffle=True, seed=seed, drop_last=True),
        validation=StreamLoader([folders.train[i] for i in held.tolist()], read, plain, **every),
        test=StreamLoader(folders.test, read, plain, **every),
        num_classes=folders.num_classes,
        in_channels=3,
        image_size=(side, side),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        name=name,
        sizes={"train": len(rest), "validation": len(held), "test": len(folders.test)},
        fingerprint=_fingerprint((*settings, folders.num_classes), repr(listing).encode()),
    )
