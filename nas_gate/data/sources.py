"""Where data comes from: one small reader per kind of set, giving arrays in memory or folders of image files.

Every reader raises FileNotFoundError where data is missing, naming the path tried and how to set it, and
ValueError where data is there but breaks a rule, naming the file and the rule.
"""

import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nas_gate.data.schedule import stratified_split
from nas_gate.data.shapes import CLASSES, draw
from nas_gate.tasks import VOID

ROOT_VARIABLE = "NAS_GATE_DATA"


@dataclass(frozen=True)
class Arrays:
    """A set in memory: x uint8 or float32 N x C x H x W; y the targets of the images.

    y has classes 0 .. num_classes - 1, of images (int64, N) or of pixels (N x H x W, VOID where there is none; uint8
    where all fit, else int64), or is float32 N x anything, and `num_classes` None.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    num_classes: int | None


@dataclass(frozen=True)
class Folders:
    """A set of RGB image files: (path, label) of each, and the function that reads one."""

    train: Sequence[tuple[str, int]]
    test: Sequence[tuple[str, int]]
    read: Callable[[str], Any]
    num_classes: int


def missing(name: str, what: str, downloads: bool = False) -> FileNotFoundError:
    """The error for data that is not there: `what` names the path tried."""
    fetch = "; data.download=true (download=True) fetches it there" if downloads else ""
    return FileNotFoundError(
        f"{name}: {what} Say where the data lies with data.root=/path (root=...) "
        f"or the environment variable {ROOT_VARIABLE}{fetch}."
    )


def need_root(name: str, root: Path | None, downloads: bool = False, fetching: bool = False) -> Path:
    """The root, which must be given, and must exist unless the data is about to be fetched."""
    if root is None:
        raise missing(name, "no data root is set.", downloads)
    if not fetching and not root.is_dir():
        raise missing(name, f"the data root {root} is not a folder.", downloads)
    return root


def digits(root: Path | None, download: bool) -> Arrays:
    """scikit-learn's 1797 digits, uint8 1 x 8 x 8 with values 0 to 16; it ships them, so root is not used.

    A fifth is the test part, always the same one.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x, y = torch.from_numpy(bunch.images).to(torch.uint8)[:, None], torch.from_numpy(bunch.target).long()
    train, test = stratified_split(y, 0.2, seed=0)
    return Arrays(x[train], y[train], x[test], y[test], 10)


def shapes(root: Path | None, download: bool) -> Arrays:
    """Pictures of shapes with a class per pixel, drawn here: root is not used."""
    (x_train, y_train), (x_test, y_test) = draw(512, "train"), draw(128, "test")
    return Arrays(x_train, y_train.to(torch.uint8), x_test, y_test.to(torch.uint8), len(CLASSES))


def torchvision_set(dataset: str, num_classes: int) -> Callable[[Path | None, bool], Arrays]:
    """A reader of one of torchvision's small sets, by class name; finding and checking is torchvision's."""

    def read(root: Path | None, download: bool) -> Arrays:
        import torchvision.datasets

        folder = need_root(dataset, root, downloads=True, fetching=download)
        parts = []
        for train in (True, False):
            which: dict[str, Any] = {"split": "train" if train else "test"} if dataset == "SVHN" else {"train": train}
            try:
                part = getattr(torchvision.datasets, dataset)(folder, download=download, **which)
            except (RuntimeError, OSError) as error:
                raise missing(dataset, f"torchvision finds no intact set in {folder}: {error}.", True) from error
            except (AssertionError, TypeError, ValueError, KeyError, EOFError) as error:
                raise ValueError(f"{dataset}: a file in {folder} cannot be read: {error!r}.") from error
            x = torch.as_tensor(part.data)
            y = torch.as_tensor(part.labels if dataset == "SVHN" else part.targets).long()
            if len(x) != len(y) or len(y) == 0 or int(y.min()) < 0 or int(y.max()) >= num_classes:
                raise ValueError(
                    f"{dataset}: every image in {folder} needs one label in 0 .. {num_classes - 1}, "
                    f"but there are {len(x)} images and {len(y)} labels"
                    + (f" in {int(y.min())} .. {int(y.max())}." if len(y) else ".")
                )
            # torchvision keeps SVHN's channels first already.
            parts.append(((x if dataset == "SVHN" else _channels_first(x)).contiguous(), y))
        (x_train, y_train), (x_test, y_test) = parts
        return Arrays(x_train, y_train, x_test, y_test, num_classes)

    return read


def _channels_first(x: Tensor) -> Tensor:
    """N x H x W or N x H x W x C -> N x C x H x W."""
    return x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2)


def npz(root: Path | None, download: bool, path: str | None = None, num_classes: int | None = None) -> Arrays:
    """Any `.npz` with x_train, y_train, x_test, y_test.

    Images are uint8, N x H x W x C or N x H x W, or floating, N x C x H x W. Labels are integers, of images (N) or of
    pixels (N x H x W, VOID where there is none), in 0 .. num_classes - 1; without `num_classes` it is the largest
    training label + 1, and each must occur. Targets of a regression are floating, N x anything.

    Args:
        root: a folder.
        path: the file, as it stands or under root; without it the only .npz under root.
        num_classes: where it is not to be told from the labels.
        download: must be false.
    """
    _refuse_download("npz", download)
    file = _find_npz(root, path)
    train, test = _npz_part(file, "train"), _npz_part(file, "test")
    (x_train, y_train), (x_test, y_test) = train, test
    if x_train.shape[1:] != x_test.shape[1:] or x_train.dtype != x_test.dtype:
        raise ValueError(
            f"{file}: x_train and x_test must agree in image shape and type, but got (channels first) "
            f"{tuple(x_train.shape[1:])} {x_train.dtype} and {tuple(x_test.shape[1:])} {x_test.dtype}."
        )
    if y_train.shape[1:] != y_test.shape[1:] or y_train.is_floating_point() != y_test.is_floating_point():
        raise ValueError(
            f"{file}: y_train and y_test must agree in shape and kind, but got "
            f"{tuple(y_train.shape[1:])} {y_train.dtype} and {tuple(y_test.shape[1:])} {y_test.dtype}."
        )
    if y_train.is_floating_point():
        if num_classes is not None:
            raise ValueError(f"{file}: y_train is floating, so that num_classes must be null, but it is {num_classes}.")
        return Arrays(x_train, y_train, x_test, y_test, None)
    present = _classes(y_train)
    if not len(present):
        raise ValueError(f"{file}: y_train must hold a class, but all its pixels are {VOID}.")
    if num_classes is None:
        num_classes = int(present[-1]) + 1
        if len(present) != num_classes:
            raise ValueError(
                f"{file}: the labels in y_train must be 0 .. K - 1, each at least once, but there are "
                f"{len(present)} different ones in {int(present[0])} .. {num_classes - 1}; "
                "where some class has no image, give num_classes."
            )
    for key, y in (("y_train", y_train), ("y_test", y_test)):
        if len(beyond := (found := _classes(y))[found >= num_classes]):
            raise ValueError(
                f"{file}: the labels in {key} must be in 0 .. {num_classes - 1}, but one is {int(beyond[-1])}."
            )
    return Arrays(x_train, y_train, x_test, y_test, num_classes)


def _classes(y: Tensor) -> Tensor:
    """The different labels of images or pixels, in order."""
    present: Tensor
    if y.dim() == 1:
        present = torch.unique(y)
        return present
    if y.dtype == torch.uint8:  # counted: sorting all pixels takes long
        present = torch.bincount(y.flatten(), minlength=VOID + 1).nonzero().flatten()
    else:
        present = torch.unique(torch.cat([torch.unique(mask) for mask in y]))
    return present[present != VOID]


def _refuse_download(name: str, download: bool) -> None:
    if download:
        raise ValueError(f"{name} cannot be downloaded: `data.download=false` must hold.")


def _find_npz(root: Path | None, path: str | None) -> Path:
    if path is not None:
        tried = [Path(path).expanduser()] + ([root / path] if root else [])
        for file in tried:
            if file.is_file():
                return file
        raise missing("npz", f"there is no file {' nor '.join(map(str, tried))} (data.path).")
    if root is None:
        raise missing("npz", "neither data.path=/file.npz nor a data root is set.")
    found = sorted(need_root("npz", root).glob("*.npz"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise missing("npz", f"there must be one .npz file in {root} or data.path must name it, but got {names}.")
    return found[0]


def _npz_part(file: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images (uint8 or float32, N x C x H x W) and targets (see `Arrays`) of "train" or "test"."""
    x, y = _npz_array(file, f"x_{part}"), _npz_array(file, f"y_{part}")
    whole = y.dtype.kind in "iu"
    if not (whole and y.ndim in (1, 3)) and not (y.dtype.kind == "f" and y.ndim > 0):
        raise ValueError(
            f"{file}: y_{part} must be integers of shape N or N x H x W, or floating, but got {y.dtype} of "
            f"shape {y.shape}."
        )
    if len(x) != len(y) or not len(y):
        raise ValueError(
            f"{file}: x_{part} and y_{part} must be of one length, at least 1, but got {len(x)} and {len(y)}."
        )
    images = _images(file, f"x_{part}", x)
    if not whole:
        if not np.isfinite(y).all():
            raise ValueError(f"{file}: the values in y_{part} must be finite, but some are not.")
        return images, torch.from_numpy(y.astype(np.float32))
    if y.min() < 0:
        raise ValueError(f"{file}: the labels in y_{part} must be >= 0, but one is {y.min()}.")
    if y.ndim == 3 and y.shape[1:] != images.shape[2:]:
        raise ValueError(
            f"{file}: y_{part} must have the height and width of the images, {tuple(images.shape[2:])}, but has "
            f"{y.shape[1:]}."
        )
    small = y.ndim == 3 and y.max() <= VOID
    return images, torch.from_numpy(y.astype(np.uint8 if small else np.int64))


def _npz_array(file: Path, key: str) -> "np.ndarray[Any, Any]":
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
            names = archive.files
            if key in names:
                return np.asarray(archive[key])
    except (
        OSError,
        ValueError,
        EOFError,
        AttributeError,
        TypeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise ValueError(
            f"{file}: {key} cannot be read; it must be a plain array (objects are refused) in an intact .npz "
            f"file: {error}"
        ) from error
    raise ValueError(f"{file}: x_train, y_train, x_test and y_test must be there, but {key} is not in {names}.")


def _images(file: Path, key: str, x: "np.ndarray[Any, Any]") -> Tensor:
    got = f"but got {x.dtype} of shape {x.shape}."
    if x.dtype == np.uint8 and x.ndim in (3, 4) and 0 not in x.shape:
        # With channels before rows and columns this would be read as many narrow channels.
        if x.ndim == 4 and x.shape[3] > min(x.shape[1:3]):
            raise ValueError(
                f"{file}: uint8 images in {key} must be N x H x W x C with fewer channels than pixels, {got}"
            )
        return _channels_first(torch.from_numpy(x)).contiguous()
    if x.dtype.kind == "f" and x.ndim == 4 and 0 not in x.shape:
        # With channels last this would be read as narrow images of many channels.
        _, height, width, channels = x.shape
        if height == width > channels or (channels <= 4 and channels < min(height, width)):
            raise ValueError(
                f"{file}: floating images in {key} must be N x C x H x W, channels first, {got} Where it is "
                "N x H x W x C, x.transpose(0, 3, 1, 2) puts them first."
            )
        if not np.isfinite(x).all():
            raise ValueError(f"{file}: images in {key} must be finite, but some values are not.")
        return torch.from_numpy(x.astype(np.float32))
    raise ValueError(
        f"{file}: {key} must be uint8 of shape N x H x W x C or N x H x W, or floating of shape N x C x H x W, {got}"
    )


def image_folder(root: Path | None, download: bool) -> Folders:
    """Image files in `root/train/<class>/` and `root/test/<class>/` (or val/, where there is no test/)."""
    from torchvision.datasets import ImageFolder

    _refuse_download("image_folder", download)
    folder = need_root("image_folder", root)
    test = folder / "test" if (folder / "test").is_dir() else folder / "val"
    for part, called in ((folder / "train", "train/"), (test, "test/ or val/")):
        if not part.is_dir():
            raise missing("image_folder", f"there must be a folder {called} of class folders in {folder}.")
    try:
        return _folders(ImageFolder(folder / "train"), ImageFolder(test))
    except FileNotFoundError as error:  # a class folder without images, or no class folders
        raise missing("image_folder", f"{error}") from error


def imagenet(root: Path | None, download: bool) -> Folders:
    """ImageNet 2012 as torchvision keeps it: root with its archives, or with train/, val/ and meta.bin."""
    from torchvision.datasets import ImageNet

    _refuse_download("imagenet", download)
    folder = need_root("imagenet", root)
    try:
        return _folders(ImageNet(folder, "train"), ImageNet(folder, "val"))
    except (RuntimeError, OSError) as error:
        raise missing("imagenet", f"torchvision finds no intact set in {folder}: {error}") from error


def read_image(path: str) -> Any:
    """The RGB image, 8 bits a channel, in a file; ValueError where its pixels have no range that 8 bits stand for.

    Pillow cuts off what exceeds 8 bits of grey: 16 bits are scaled here.
    """
    from PIL import Image

    with Path(path).open("rb") as file, Image.open(file) as image:
        if image.mode.startswith("I;16"):
            values = np.asarray(image).astype(np.uint32)
            return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
        if image.mode in ("I", "F"):
            raise ValueError(f"images must have 8 bits a channel, or 16 bits of grey, but its mode is {image.mode}.")
        return image.convert("RGB")


def _folders(train: Any, test: Any) -> Folders:
    if train.classes != test.classes:
        differ = sorted(set(map(str, train.classes)) ^ set(map(str, test.classes)))
        raise ValueError(
            f"The class folders of {train.root} and {test.root} must be the same, "
            f"but these are in one only: {', '.join(differ)}."
        )
    return Folders(train.samples, test.samples, read_image, len(train.classes))
