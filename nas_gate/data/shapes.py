"""A small set for segmentation, drawn on the spot: discs, squares and triangles on noise."""

import torch
from torch import Tensor

from nas_gate.data.schedule import generator

SIDE = 32
CLASSES = ("background", "disc", "square", "triangle")


def draw(images: int, part: str) -> tuple[Tensor, Tensor]:
    """Pictures, uint8 N x 3 x 32 x 32, and the class of every pixel, int64 N x 32 x 32; the same for the same `part`.

    Three figures of random kind, place and size lie over each other in each picture. A figure differs from what lies
    around it by a random brightness alone, and all is noisy, so that its form must be seen.
    """
    rng = generator("shapes", part)
    row, column = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    x = torch.full((images, SIDE, SIDE), 100.0)
    y = torch.zeros(images, SIDE, SIDE, dtype=torch.int64)
    for _ in range(3):
        kind = torch.randint(1, len(CLASSES), (images, 1, 1), generator=rng)
        size = torch.randint(4, 9, (images, 1, 1), generator=rng)
        down, right = (torch.randint(4, SIDE - 4, (images, 1, 1), generator=rng) for _ in range(2))
        down, right = row - down, column - right
        inside = torch.where(kind == 1, down**2 + right**2 <= size**2, (down.abs() <= size) & (right.abs() <= size))
        inside = torch.where(kind == 3, inside & (2 * right.abs() <= down + size), inside)
        light = torch.randint(130, 230, (images, 1, 1), generator=rng).float()
        x, y = torch.where(inside, light, x), torch.where(inside, kind, y)
    noise = 15 * torch.randn(images, 3, SIDE, SIDE, generator=rng)
    return (x[:, None] + noise).clamp(0, 255).to(torch.uint8), y
