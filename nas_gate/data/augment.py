"""Augmentations: whole batches at once on the device for tensors, image by image for streamed files."""

from dataclasses import dataclass

import torch
from torch import Tensor


def crop(x: Tensor, offset: Tensor) -> Tensor:
    """Each image seen through a window shifted by its own offset; zero (black) outside of the image.

    out[n, c, i, j] = x[n, c, i + offset[n, 0], j + offset[n, 1]]. With offsets in [-p, p] this is the random
    crop after padding by p on every side (He et al., arXiv 1512.03385, section 4.2).

    Args:
        x: N x C x H x W.
        offset: N x 2, int64, pixels (down, right).
    """
    n, c, h, w = x.shape
    row = torch.arange(h, device=x.device) + offset[:, :1]
    column = torch.arange(w, device=x.device) + offset[:, 1:]
    inside = ((row >= 0) & (row < h))[:, :, None] & ((column >= 0) & (column < w))[:, None, :]
    source = row.clamp(0, h - 1)[:, :, None] * w + column.clamp(0, w - 1)[:, None, :]
    moved = x.reshape(n, c, h * w).gather(2, source.reshape(n, 1, h * w).expand(n, c, h * w))
    return moved.view(n, c, h, w) * inside[:, None]


def flip(x: Tensor, which: Tensor) -> Tensor:
    """Images of x (N x C x H x W) mirrored left to right where `which` (N, bool) is true."""
    return torch.where(which[:, None, None, None], x.flip(-1), x)


def cutout(x: Tensor, centre: Tensor, side: int) -> Tensor:
    """A square of `side` pixels around each image's centre set to 0, clipped at the border.

    Rows centre - side // 2 up to, not including, centre - side // 2 + side; columns likewise (DeVries and
    Taylor, arXiv 1708.04552). Meant for normalised images, where 0 is the mean.

    Args:
        x: N x C x H x W.
        centre: N x 2, int64, pixels (row, column).
        side: pixels.
    """
    start = centre - side // 2
    row = torch.arange(x.shape[2], device=x.device) - start[:, :1]
    column = torch.arange(x.shape[3], device=x.device) - start[:, 1:]
    hole = ((row >= 0) & (row < side))[:, :, None] & ((column >= 0) & (column < side))[:, None, :]
    return x.masked_fill(hole[:, None], 0)


@dataclass(frozen=True)
class Choices:
    """What chance decided for N images: crop offsets (N x 2), flips (N), cutout centres (N x 2)."""

    offset: Tensor
    mirrored: Tensor
    centre: Tensor

    def to(self, device: torch.device) -> "Choices":
        """The same choices on `device`."""
        return Choices(self.offset.to(device), self.mirrored.to(device), self.centre.to(device))


@dataclass(frozen=True)
class Augment:
    """Batched augmentation of small images.

    Args:
        crop: padding on every side, in pixels, of a random crop back to the image's size; 0 for none.
        flip: mirror half of the images left to right.
        cutout: side, in pixels, of a square set to the mean at a random place; 0 for none.
    """

    crop: int = 0
    flip: bool = False
    cutout: int = 0

    def __post_init__(self) -> None:
        for name in ("crop", "cutout"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ValueError(f"`augment.{name}` must be a whole number of pixels >= 0, but got {value!r}.")
        if not isinstance(self.flip, bool):
            raise ValueError(f"`augment.flip` must be true or false, but got {self.flip!r}.")

    def check(self, image_size: tuple[int, int]) -> None:
        """Raise ValueError where a crop could show nothing, or a cutout hide all, of an image (h, w)."""
        for name in ("crop", "cutout"):
            if getattr(self, name) >= min(image_size):
                raise ValueError(
                    f"`augment.{name}` must be smaller than the image, but got {getattr(self, name)} pixels "
                    f"for images of {image_size[0]} x {image_size[1]}."
                )

    def draw(self, n: int, image_size: tuple[int, int], rng: torch.Generator) -> Choices:
        """Random choices for n images of size (h, w), on the generator's device."""
        h, w = image_size
        return Choices(
            torch.randint(-self.crop, self.crop + 1, (n, 2), generator=rng),
            (torch.rand(n, generator=rng) < 0.5) & self.flip,
            torch.stack([torch.randint(side, (n,), generator=rng) for side in (h, w)], 1),
        )

    def move(self, x: Tensor, choices: Choices, index: Tensor) -> Tensor:
        """Crop and flip raw images x (N x C x H x W) as decided for the images at `index` (N)."""
        if self.crop:
            x = crop(x, choices.offset[index])
        return flip(x, choices.mirrored[index]) if self.flip else x

    def hide(self, x: Tensor, choices: Choices, index: Tensor) -> Tensor:
        """Cut out of normalised images x (N x C x H x W) as decided for the images at `index` (N)."""
        return cutout(x, choices.centre[index], self.cutout) if self.cutout else x


@dataclass(frozen=True)
class StreamAugment:
    """Augmentation of streamed images of any size (Szegedy et al., arXiv 1409.4842, section 6).

    Args:
        scale: a random part of the image, of at least this share of its area, is resized to the wanted size.
        flip: mirror half of the images left to right.
    """

    scale: float = 0.08
    flip: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.scale, bool) or not isinstance(self.scale, (int, float)) or not 0 < self.scale <= 1:
            raise ValueError(f"`0 < augment.scale <= 1` must hold, but got {self.scale!r}.")
        if not isinstance(self.flip, bool):
            raise ValueError(f"`augment.flip` must be true or false, but got {self.flip!r}.")
