"""Which images come when: seeded generators, the order of an epoch, shards of it, and the held-out split."""

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor


def seed_from(*key: int | str) -> int:
    """A 63-bit seed that depends on every part of `key` and on nothing else."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded from `key`, independent of the global one.

    Always on the CPU, so that every device sees the same choices.
    """
    return torch.Generator().manual_seed(seed_from(*key))


@dataclass(frozen=True)
class Schedule:
    """The batches of every epoch as indices, a function of (seed, epoch) alone.

    `batch_size` counts the images of one step over all ranks; each rank takes every `world_size`-th image of
    it. All ranks take the same number of steps.
    """

    size: int
    batch_size: int
    shuffle: bool = False
    drop_last: bool = False
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"`batch_size >= 1` must hold, but got {self.batch_size}.")
        if self.seed < 0:
            raise ValueError(f"`seed >= 0` must hold, but got {self.seed}.")
        if self.size < 1:
            raise ValueError("A loader needs at least one image, but got none.")
        if self.drop_last and self.batch_size > self.size:
            raise ValueError(
                f"`batch_size <= number of training images` must hold, for a smaller last batch is dropped, "
                f"but got batch_size={self.batch_size} and {self.size} images."
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"`0 <= rank < world_size` must hold, but got rank={self.rank}, world_size={self.world_size}."
            )
        if self.batch_size % self.world_size:
            raise ValueError(
                f"`batch_size` must be a multiple of `world_size`, but got batch_size={self.batch_size}, "
                f"world_size={self.world_size}."
            )
        if self._used // self.world_size < len(self):
            raise ValueError(
                f"Every rank needs an image in each of its {len(self)} steps, but {self.size} images for "
                f"world_size={self.world_size} and batch_size={self.batch_size} are too few."
            )

    def __len__(self) -> int:
        """Steps in an epoch, the same for every rank."""
        return self.size // self.batch_size if self.drop_last else -(-self.size // self.batch_size)

    @property
    def _used(self) -> int:
        return len(self) * self.batch_size if self.drop_last else self.size

    def batches(self, epoch: int) -> tuple[Tensor, ...]:
        """`len(self)` int64 index tensors on the CPU: this rank's part of the epoch."""
        if epoch < 0:
            raise ValueError(f"`epoch >= 0` must hold, but got {epoch}.")
        if self.shuffle:
            order = torch.randperm(self.size, generator=generator("order", self.seed, epoch))
        else:
            order = torch.arange(self.size)
        # A strided part cut into blocks is the strided part of every block.
        mine = order[: self._used][self.rank :: self.world_size]
        blocks = torch.split(mine, self.batch_size // self.world_size)
        # A last batch smaller than world_size leaves some ranks one block short: they spread theirs out.
        return blocks if len(blocks) == len(self) else mine.tensor_split(len(self))

    def shard(self, rank: int, world_size: int) -> "Schedule":
        """The schedule of one rank. The union over ranks is this schedule, each image once."""
        if self.world_size != 1:
            raise ValueError(f"A loader can be sharded once, but this is rank {self.rank}/{self.world_size}.")
        return replace(self, rank=rank, world_size=world_size)


def stratified_split(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices (rest, held): `share` of the images held out, of each class in proportion, chosen by `seed`.

    The number held is round(len(labels) * share), shared among classes by largest remainder; every class
    keeps at least one image in rest. Of equal remainders the first classes come first; where some class's share is
    less than one image, `seed` decides. Both results are sorted int64.

    Raises:
        ValueError: share outside (0, 1), or nothing would be held.
    """
    if not 0 < share < 1:
        raise ValueError(f"`0 < validation < 1` must hold, but got {share}.")
    counts = torch.bincount(labels)
    exact = counts.double() * share
    take = exact.floor().long()
    missing = round(len(labels) * share) - int(take.sum())
    order = torch.arange(len(counts))
    if bool((take[counts > 0] == 0).any()):  # in one order for all seeds the last classes would never be held
        order = torch.randperm(len(counts), generator=generator("ties", seed))
    take[order[torch.argsort((take - exact)[order], stable=True)][: max(missing, 0)]] += 1
    take = take.minimum(counts - 1).clamp(min=0)
    if not take.any():
        raise ValueError(
            f"`validation` must hold out at least one image of a class that has two or more, "
            f"but got {share} of {len(labels)} images in {int((counts > 0).sum())} classes."
        )
    rng = generator("split", seed)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label, number in enumerate(take.tolist()):
        members = (labels == label).nonzero().flatten()
        held[members[torch.randperm(len(members), generator=rng)[:number]]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()
