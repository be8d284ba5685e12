"""Loaders: iterables of (x, y) batches whose order and augmentation are functions of (seed, epoch) alone."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nas_gate.data.augment import Augment
from nas_gate.data.schedule import Schedule, generator, seed_from

Device: TypeAlias = torch.device | str


class Loader(Protocol):
    """What training needs of a data set's part.

    Iterating gives (x, y): x float32 N x C x H x W, normalised; y the targets, N x ..., classes int64, others as they
    are; both on the loader's device.
    An epoch repeats exactly for the same `set_epoch`, whatever the global random state.
    """

    schedule: Schedule

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the epoch last set (0 at first)."""
        ...

    def __len__(self) -> int:
        """Batches in an epoch."""
        ...

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives."""
        ...

    def to(self, device: Device) -> "Loader":
        """A loader of the same batches on `device`."""
        ...

    def shard(self, rank: int, world_size: int) -> "Loader":
        """A loader of one rank's part of every batch; the number of batches stays the same."""
        ...


def normalise(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x - mean) / std per channel as float32; x is N x C x H x W of any dtype, mean and std are C."""
    return (x.float() - mean[:, None, None]) / std[:, None, None]


def given(y: Tensor) -> Tensor:
    """Targets as batches give them: masks, which are held as uint8, as int64."""
    return y.long() if y.dtype == torch.uint8 else y


class TensorLoader:
    """Batches of a set that lies in memory, augmented on its device.

    Args:
        x: N x C x H x W, uint8 or floating.
        y: N x ..., the targets: classes, int64 or uint8, of images (N) or pixels (N x H x W), or floating.
        batch_size: images per step, over all ranks.
        mean: per channel, in the units of x.
        std: per channel, in the units of x.
        shuffle: a new order every epoch.
        augment: None for none.
        seed: of the order and the augmentation.
        drop_last: leave out the last batch where it is smaller than the others.
        device: where the tensors live; None for where they are.

    Raises:
        ValueError: shapes that do not fit together, a batch size that the set cannot fill, or an augmentation that
            moves the pixels of x where those of y would have to move along.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        *,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        shuffle: bool = False,
        augment: Augment | None = None,
        seed: int = 0,
        drop_last: bool = False,
        device: Device | None = None,
    ) -> None:
        if x.dim() != 4 or y.shape[:1] != x.shape[:1] or not len(mean) == len(std) == x.shape[1]:
            raise ValueError(
                f"x must be N x C x H x W, y N x ..., mean and std C, but got {tuple(x.shape)}, {tuple(y.shape)}, "
                f"{len(mean)} and {len(std)}."
            )
        self.schedule = Schedule(len(x), batch_size, shuffle, drop_last, seed)
        self.image_size = (x.shape[2], x.shape[3])
        if augment:
            augment.check(self.image_size)
            if (augment.crop or augment.flip) and y.dim() > 2:
                raise ValueError(
                    f"`augment.crop` and `augment.flip` must be 0 and false where every pixel has a target, but got "
                    f"{augment.crop} and {augment.flip} with targets of shape {tuple(y.shape)}."
                )
        self.augment = augment
        self.device = torch.device(device) if device is not None else x.device
        self.x, self.y = x.to(self.device), y.to(self.device)
        self.mean = torch.tensor(mean, dtype=torch.float32, device=self.device)
        self.std = torch.tensor(std, dtype=torch.float32, device=self.device)
        self._epoch = 0

    def __len__(self) -> int:
        return len(self.schedule)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._epoch_batches(self._epoch)

    def _epoch_batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        on_cpu = self.schedule.batches(epoch)
        order = torch.cat(on_cpu).to(self.device)  # one transfer an epoch
        batches = torch.split(order, [len(batch) for batch in on_cpu])
        if self.augment is None:
            for index in batches:
                yield normalise(self.x[index], self.mean, self.std), given(self.y[index])
            return
        # Drawn for the whole set, by image: shards and batch sizes see the same augmented images.
        rng = generator("augment", self.schedule.seed, epoch)
        choices = self.augment.draw(len(self.x), self.image_size, rng).to(self.device)
        for index in batches:
            x = normalise(self.augment.move(self.x[index], choices, index), self.mean, self.std)
            yield self.augment.hide(x, choices, index), given(self.y[index])

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, >= 0, that the next iteration gives."""
        self._epoch = epoch

    def to(self, device: Device) -> "TensorLoader":
        """A loader of the same batches whose tensors live on `device`."""
        new = copy.copy(self)
        new.device = torch.device(device)
        new.x, new.y, new.mean, new.std = (t.to(device) for t in (self.x, self.y, self.mean, self.std))
        return new

    def shard(self, rank: int, world_size: int) -> "TensorLoader":
        """A loader of one rank's part of every batch; the number of batches stays the same."""
        new = copy.copy(self)
        new.schedule = self.schedule.shard(rank, world_size)
        return new


class _Images(Dataset[tuple[Tensor, int]]):
    """Image files of one epoch: index -> (uint8 C x H x W, label), the same in whichever process reads it."""

    def __init__(
        self,
        samples: Sequence[tuple[str, int]],
        read: Callable[[str], Any],
        transform: Callable[[Any], Tensor],
        seed: tuple[int, int],
    ) -> None:
        self.samples, self.read, self.transform, self.seed = samples, read, transform, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        try:
            image = self.read(path)
        except Exception as error:  # whatever a reader raises: a worker hands on what one string makes
            raise ValueError(f"{path}: this image cannot be read: {error}") from error
        # torchvision's transforms know only the global generator: seed it for this image, then put it back.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_from("image", *self.seed, index))
            return self.transform(image), label


class StreamLoader:
    """Batches of image files, read and augmented by worker processes, normalised on the device.

    Args:
        samples: (path, label) per image.
        read: path -> image; what it raises becomes a ValueError that names the path.
        transform: image -> uint8 C x H x W, all of one size.
        batch_size: images per step, over all ranks.
        mean: per channel, in units of 0 to 255.
        std: per channel, in units of 0 to 255.
        shuffle: a new order every epoch.
        seed: of the order and the augmentation.
        drop_last: leave out the last batch where it is smaller than the others.
        workers: processes that read; 0 reads in this one.
        device: where batches are put.
    """

    def __init__(
        self,
        samples: Sequence[tuple[str, int]],
        read: Callable[[str], Any],
        transform: Callable[[Any], Tensor],
        *,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        workers: int = 4,
        device: Device = "cpu",
    ) -> None:
        if workers < 0:
            raise ValueError(f"`workers >= 0` must hold, but got {workers}.")
        self.schedule = Schedule(len(samples), batch_size, shuffle, drop_last, seed)
        self.samples, self.read, self.transform, self.workers = samples, read, transform, workers
        self.device = torch.device(device)
        self.mean = torch.tensor(mean, dtype=torch.float32, device=self.device)
        self.std = torch.tensor(std, dtype=torch.float32, device=self.device)
        self._epoch = 0

    def __len__(self) -> int:
        return len(self.schedule)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._epoch_batches(self._epoch)

    def _epoch_batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        on_gpu = self.device.type == "cuda"
        batches = DataLoader(
            _Images(self.samples, self.read, self.transform, (self.schedule.seed, epoch)),
            batch_sampler=[batch.tolist() for batch in self.schedule.batches(epoch)],
            num_workers=self.workers,
            pin_memory=on_gpu,
            # The loader draws its workers' seeds; a generator of its own spares the global one.
            generator=generator("workers", self.schedule.seed, epoch),
        )
        for x, y in batches:
            x, y = x.to(self.device, non_blocking=on_gpu), y.to(self.device, non_blocking=on_gpu)
            yield normalise(x, self.mean, self.std), y

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, >= 0, that the next iteration gives."""
        self._epoch = epoch

    def to(self, device: Device) -> "StreamLoader":
        """A loader of the same batches that are put on `device`."""
        new = copy.copy(self)
        new.device = torch.device(device)
        new.mean, new.std = self.mean.to(device), self.std.to(device)
        return new

    def shard(self, rank: int, world_size: int) -> "StreamLoader":
        """A loader of one rank's part of every batch; the number of batches stays the same."""
        new = copy.copy(self)
        new.schedule = self.schedule.shard(rank, world_size)
        return new
