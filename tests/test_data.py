import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from nas_gate import data
from nas_gate.data import (
    NAMES,
    Augment,
    Schedule,
    StreamAugment,
    TensorLoader,
    crop,
    cutout,
    flip,
    load,
    stratified_split,
)

CONF = Path(__file__).parent.parent / "conf" / "data"


def epoch_of(loader, epoch=0):
    loader.set_epoch(epoch)
    return list(loader)


def same(batches, others):
    return len(batches) == len(others) and all(
        torch.equal(x, a) and torch.equal(y, b) for (x, y), (a, b) in zip(batches, others)
    )


def numbered(n=50, **settings):
    """A loader of n distinct random 1 x 6 x 6 images whose labels are their numbers, and the images."""
    x = torch.randint(1, 256, (n, 1, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return TensorLoader(x, torch.arange(n), **({"batch_size": 8, "mean": [0.0], "std": [1.0]} | settings)), x


# Digits


def test_digits_sizes_and_description():
    d = load("digits", batch_size=64, validation=0.1)
    assert d.sizes == {
        "train": 1294,
        "validation": 144,
        "test": 359,
    }  # 1797 * 0.2 = 359.4, 1438 * 0.1 = 143.8
    assert (d.name, d.num_classes, d.in_channels, d.image_size) == ("digits", 10, 1, (8, 8))
    assert (len(d.train), len(d.validation), len(d.test)) == (
        20,
        3,
        6,
    )  # train leaves out 1294 - 20 * 64 images
    x, y = next(iter(d.train))
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((64, 1, 8, 8), torch.float32, (64,), torch.int64)
    assert x.is_contiguous()


def test_digits_parts_are_disjoint_and_complete():
    from sklearn.datasets import load_digits

    d = load("digits")
    parts = [loader.x for loader in (d.train, d.validation, d.test)]
    everything = torch.cat(parts).flatten(1).tolist()
    whole = torch.from_numpy(load_digits().images).to(torch.uint8).flatten(1).tolist()
    assert sorted(everything) == sorted(whole)


def test_digits_test_part_does_not_depend_on_the_seed():
    one, other = load("digits", seed=0), load("digits", seed=1)
    assert torch.equal(one.test.x, other.test.x)
    assert not torch.equal(one.validation.x, other.validation.x)
    assert torch.equal(one.validation.x, load("digits", seed=0).validation.x)


def test_digits_parts_are_stratified():
    d = load("digits")
    shares = [torch.bincount(p.y, minlength=10) / len(p.y) for p in (d.train, d.validation, d.test)]
    assert (shares[0] - shares[1]).abs().max() < 0.01
    assert (shares[0] - shares[2]).abs().max() < 0.01


def test_normalisation_is_by_the_training_part():
    d = load("digits", validation=0.3)
    pixels = d.train.x.double()
    x, _ = next(iter(d.test))
    expected = (d.test.x[: len(x)].double() - pixels.mean()) / pixels.std(correction=0)
    torch.testing.assert_close(x.double(), expected, rtol=1e-5, atol=1e-5)


def test_channel_statistics_are_per_channel_and_a_constant_channel_is_safe():
    x = torch.zeros(300, 2, 4, 4, dtype=torch.uint8)
    x[:150, 0] = 10  # mean 5, deviation 5
    x[:, 1] = 7
    assert data.catalog.channel_statistics(x) == ([5.0, 7.0], [5.0, 1.0])


# The split


@pytest.mark.parametrize("seed", range(5))
def test_stratified_split_by_hand(seed):
    labels = torch.tensor([0] * 10 + [1] * 20 + [2] * 30 + [4])
    rest, held = stratified_split(labels, 0.2, seed)  # class 3 is empty, class 4 has one image, which stays
    assert sorted([*rest.tolist(), *held.tolist()]) == list(range(61))
    assert torch.bincount(labels[held]).tolist() == [2, 4, 6]
    assert all(torch.equal(a, b) for a, b in zip(stratified_split(labels, 0.2, seed), (rest, held)))


def test_stratified_split_largest_remainder():
    labels = torch.tensor([0] * 14 + [1] * 16 + [2] * 10)  # shares 3.5, 4, 2.5 of 10: one of the halves rounds up
    assert torch.bincount(labels[stratified_split(labels, 0.25, 0)[1]]).tolist() == [4, 4, 2]


def test_stratified_split_of_classes_too_small_for_an_image_each_is_shared_by_the_seed():
    labels = torch.arange(200).repeat(5)  # half an image of each class: 100 classes hold one
    held = [labels[stratified_split(labels, 0.1, seed)[1]] for seed in range(12)]
    assert all(len(each) == len(each.unique()) == 100 for each in held)
    assert torch.equal(labels[stratified_split(labels, 0.1, 3)[1]], held[3])
    assert len(torch.cat(held).unique()) == 200  # that some class is left out by all has a chance of 200 / 2^12
    uneven = torch.tensor([0] * 5 + [1] * 9 + [2] * 9 + [3] * 15)  # 0.5, 0.9, 0.9, 1.5
    for seed in range(5):
        assert torch.bincount(uneven[stratified_split(uneven, 0.1, seed)[1]], minlength=4).tolist()[1:3] == [1, 1]


def test_stratified_split_of_classes_with_an_image_each_resolves_ties_in_their_order():
    labels = torch.arange(4).repeat(15)  # 1.5 images of each
    for seed in range(5):
        assert torch.bincount(labels[stratified_split(labels, 0.1, seed)[1]]).tolist() == [2, 2, 1, 1]


def test_stratified_split_that_holds_nothing():
    with pytest.raises(ValueError, match=r"0\.1 of 4 images in 4 classes"):
        stratified_split(torch.arange(4), 0.1, 0)


# Epochs


def test_an_epoch_is_a_function_of_seed_and_epoch_alone():
    augment = Augment(crop=2, flip=True, cutout=2)
    loader, _ = numbered(shuffle=True, augment=augment, seed=3)
    epochs = [epoch_of(loader, e) for e in range(3)]
    resumed, _ = numbered(shuffle=True, augment=augment, seed=3)
    torch.manual_seed(99)
    assert same(epoch_of(resumed, 2), epochs[2])
    assert same(epoch_of(resumed, 2), epochs[2])  # and again, without hidden state
    assert not same(epochs[0], epochs[1])
    assert not same(epoch_of(numbered(shuffle=True, augment=augment, seed=4)[0], 0), epochs[0])


def test_iterating_leaves_the_global_generator_alone():
    loader, _ = numbered(shuffle=True, augment=Augment(crop=2, flip=True, cutout=2))
    before = torch.get_rng_state()
    epoch_of(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_set_epoch_acts_on_the_next_iteration_only():
    loader, _ = numbered(shuffle=True)
    expected = epoch_of(loader, 0)
    running = iter(loader)
    loader.set_epoch(1)
    assert same(list(running), expected)


def test_augmentation_does_not_depend_on_the_batch_size():
    augment = Augment(crop=2, flip=True)
    small, large = (epoch_of(numbered(shuffle=True, augment=augment, batch_size=b)[0]) for b in (7, 50))
    assert torch.equal(torch.cat([x for x, _ in small]), large[0][0])


def test_evaluation_keeps_order_and_pixels():
    loader, x = numbered()
    batches = epoch_of(loader, 5)
    assert [len(y) for _, y in batches] == [8] * 6 + [2]
    assert torch.equal(torch.cat([b for b, _ in batches]), x.float())


def test_drop_last_and_length():
    loader, _ = numbered(drop_last=True)
    assert len(loader) == len(epoch_of(loader)) == 6


def test_to_gives_a_new_loader_on_the_device():
    loader, _ = numbered(shuffle=True, augment=Augment(crop=1, flip=True, cutout=1))
    loader.set_epoch(4)
    moved = loader.to("meta")
    assert [x.device.type for x, _ in moved] == ["meta"] * 7
    assert loader.x.device.type == "cpu"
    assert same(list(loader.to("cpu")), list(loader))


# Shards


@pytest.mark.parametrize(("size", "batch_size", "world_size"), [(50, 8, 2), (50, 12, 3), (49, 16, 4), (33, 8, 4)])
def test_shards_cover_the_set_once_in_equally_many_steps(size, batch_size, world_size):
    whole = Schedule(size, batch_size, shuffle=True, seed=2)
    shards = [whole.shard(rank, world_size) for rank in range(world_size)]
    parts = [shard.batches(7) for shard in shards]
    assert {len(p) for p in parts} == {len(s) for s in shards} == {len(whole)}
    assert all(len(b) > 0 for p in parts for b in p)
    assert sorted(torch.cat([torch.cat(p) for p in parts]).tolist()) == list(range(size))


def test_shards_share_every_full_batch():
    loader, _ = numbered(shuffle=True, augment=Augment(crop=1, flip=True), drop_last=True)
    shards = [epoch_of(loader.shard(rank, 2), 3) for rank in range(2)]
    for (x, y), (x0, y0), (x1, y1) in zip(epoch_of(loader, 3), *shards, strict=True):
        assert torch.equal(torch.stack([y0, y1], 1).flatten(), y)
        assert torch.equal(torch.stack([x0, x1], 1).flatten(0, 1), x)


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"batch_size": 0}, "batch_size >= 1"),
        ({"seed": -1}, "seed >= 0"),
        ({"batch_size": 11, "drop_last": True}, "batch_size=11 and 10 images"),
        ({"rank": 2, "world_size": 2}, "rank=2, world_size=2"),
        ({"batch_size": 5, "world_size": 2}, "multiple of `world_size`"),
        ({"batch_size": 16, "world_size": 16}, "too few"),
        ({"size": 0}, "at least one image"),
    ],
)
def test_schedule_errors(arguments, rule):
    with pytest.raises(ValueError, match=rule):
        Schedule(**({"size": 10, "batch_size": 4} | arguments))


def test_schedule_refuses_a_second_sharding_and_a_negative_epoch():
    with pytest.raises(ValueError, match="sharded once"):
        Schedule(10, 4).shard(0, 2).shard(0, 2)
    with pytest.raises(ValueError, match="epoch >= 0"):
        Schedule(10, 4).batches(-1)


# Augmentation, against one image and one pixel at a time


def slow_crop(image, dy, dx):
    _, h, w = image.shape
    out = np.zeros_like(image)
    for i in range(h):
        for j in range(w):
            if 0 <= i + dy < h and 0 <= j + dx < w:
                out[:, i, j] = image[:, i + dy, j + dx]
    return out


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_crop_against_one_pixel_at_a_time(dtype):
    x = torch.randint(1, 256, (40, 3, 5, 7)).to(dtype)
    offset = torch.randint(-4, 5, (40, 2))
    expected = np.stack([slow_crop(image, *o) for image, o in zip(x.numpy(), offset.tolist())])
    assert torch.equal(crop(x, offset), torch.from_numpy(expected))


def test_crop_is_torchvisions_pad_then_crop():
    from torchvision.transforms.v2 import functional as F

    x = torch.randint(0, 256, (9, 3, 8, 8), dtype=torch.uint8)
    offset = torch.randint(-2, 3, (9, 2))
    for image, (dy, dx), got in zip(x, offset.tolist(), crop(x, offset)):
        assert torch.equal(F.crop(F.pad(image, [2]), 2 + dy, 2 + dx, 8, 8), got)


def test_crop_with_zero_offset_is_identity():
    x = torch.randn(4, 3, 6, 5)
    assert torch.equal(crop(x, torch.zeros(4, 2, dtype=torch.long)), x)


def test_flip_mirrors_the_chosen_images_only():
    x = torch.tensor([[[[1, 2, 3]]], [[[4, 5, 6]]]])
    assert flip(x, torch.tensor([True, False])).flatten().tolist() == [3, 2, 1, 4, 5, 6]


def test_cutout_by_hand():
    x = torch.ones(3, 2, 4, 5)
    out = cutout(x, torch.tensor([[1, 1], [0, 4], [3, 2]]), 2)
    zeros = [sorted(map(tuple, (o[0] == 0).nonzero().tolist())) for o in out]
    assert zeros == [[(0, 0), (0, 1), (1, 0), (1, 1)], [(0, 3), (0, 4)], [(2, 1), (2, 2), (3, 1), (3, 2)]]
    assert torch.equal(out[:, 0], out[:, 1])
    assert bool((x == 1).all())


def test_loader_gives_every_image_its_own_crop_and_flip():
    loader, images = numbered(400, shuffle=True, augment=Augment(crop=1, flip=True), batch_size=100)
    seen = []
    for x, y in epoch_of(loader):
        for got, n in zip(x.numpy(), y.tolist()):
            image = images[n].float().numpy()
            ways = [
                (dy, dx, mirrored)
                for dy in (-1, 0, 1)
                for dx in (-1, 0, 1)
                for mirrored in (False, True)
                if np.array_equal(slow_crop(image, dy, dx)[..., :: -1 if mirrored else 1], got)
            ]
            assert len(ways) == 1
            seen += ways
    assert len(set(seen)) == 18  # all ways occur; each is expected 22 times of 400
    assert 150 < sum(mirrored for *_, mirrored in seen) < 250


def test_cutout_hides_the_mean():
    loader, images = numbered(augment=Augment(cutout=3), mean=[100.0], std=[10.0])
    for x, y in epoch_of(loader):
        plain = (images[y].float() - 100) / 10
        changed = x != plain
        assert bool((x[changed] == 0).all())
        assert bool((changed.flatten(1).sum(1) <= 9).all())
        assert bool(changed.flatten(1).any(1).all())


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: Augment(crop=-1), "augment.crop"),
        (lambda: Augment(cutout=1.5), "augment.cutout"),
        (lambda: Augment(flip=2), "augment.flip"),
        (lambda: StreamAugment(scale=0), "augment.scale"),
        (lambda: StreamAugment(flip="yes"), "augment.flip"),
        (lambda: load("digits", augment={"crop": 8}), "smaller than the image.* 8 pixels"),
        (
            lambda: load("digits", augment={"rotate": 8}),
            "no augmentation 'rotate'; valid ones: crop, flip, cutout",
        ),
        (lambda: load("digits", augment="strong"), "'default', 'none' or a mapping.*'strong'"),
    ],
)
def test_augment_errors(make, rule):
    with pytest.raises(ValueError, match=rule):
        make()


def test_augment_by_name_and_by_parameters():
    assert load("digits").train.augment == Augment(crop=1)
    assert load("digits", augment="none").train.augment is None
    assert load("digits", augment=None).train.augment is None
    assert load("digits", augment={"crop": 2, "flip": True}).train.augment == Augment(2, True)
    d = load("digits")
    assert d.validation.augment is d.test.augment is None
    assert not d.validation.schedule.shuffle
    assert not d.test.schedule.shuffle


# load


@pytest.mark.parametrize(
    ("name", "arguments", "rule"),
    [
        ("cifar11", {}, "no data set 'cifar11'; valid names: digits, cifar10, .*npz"),
        ("digits", {"batch_size": 0}, "`batch_size` must be a whole number >= 1, but got 0"),
        ("digits", {"batch_size": 1.5}, "`batch_size` must be a whole number"),
        ("digits", {"batch_size": 4000}, "batch_size=4000 and 1294 images"),
        ("digits", {"validation": 0}, "`0 < validation < 1` must hold, but got 0"),
        ("digits", {"validation": 1.0}, "`0 < validation < 1`"),
        ("digits", {"workers": -1}, "`workers`"),
        ("digits", {"seed": -1}, "`seed`"),
        ("digits", {"path": "x"}, "digits takes no argument 'path'; its own are: none"),
        ("digits", {"validation": "0.1"}, "`0 < validation < 1` must hold, but got '0.1'"),
        ("digits", {"validation": None}, "`0 < validation < 1` must hold, but got None"),
        ("digits", {"validation": True}, "`0 < validation < 1` must hold, but got True"),
        ("digits", {"download": "no"}, "`download` must be true or false, but got 'no'"),
        ("digits", {"root": 5}, "`root` must be the name of a file or folder, but got 5"),
        ("npz", {"path": 5}, "`path` must be the name of a file or folder, but got 5"),
        ("npz", {"num_classes": 3.0}, "`num_classes` must be a whole number >= 1, but got 3.0"),
        ("imagenet", {"image_size": "abc"}, "`image_size` must be a whole number >= 1, but got 'abc'"),
        ("imagenet", {"image_size": 32.5}, "`image_size` must be a whole number >= 1, but got 32.5"),
        ("imagenet", {"image_size": 32, "resize": True}, "`resize` must be a whole number >= 1, but got True"),
        ("imagenet", {"image_size": 0}, "`image_size` must be a whole number >= 1, but got 0"),
        ("imagenet", {"image_size": 64, "resize": 32}, "image_size=64, resize=32"),
    ],
)
def test_load_errors(name, arguments, rule):
    with pytest.raises(ValueError, match=rule):
        load(name, **arguments)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("digits", "shapes")])
def test_missing_root_says_how_to_set_it(name, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"data\.root=.*NAS_GATE_DATA"):
        load(name)
    absent = tmp_path / "absent"
    with pytest.raises(FileNotFoundError, match=str(absent)):
        load(name, root=absent)
    monkeypatch.setenv("NAS_GATE_DATA", str(absent))
    with pytest.raises(FileNotFoundError, match=str(absent)):
        load(name)
    assert not absent.exists()


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion_mnist", "mnist", "svhn"])
def test_empty_root_says_where_and_how(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}.*not found.*data.download=true"):
        load(name, root=tmp_path)


@pytest.mark.parametrize("name", ["image_folder", "imagenet", "npz"])
def test_what_cannot_be_downloaded(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name} cannot be downloaded"):
        load(name, root=tmp_path, download=True)


def test_fingerprint_changes_with_what_the_batches_depend_on():
    base = load("digits").fingerprint
    assert load("digits").fingerprint == base
    changes = [
        {"seed": 1},
        {"validation": 0.2},
        {"batch_size": 64},
        {"augment": "none"},
        {"augment": {"crop": 2}},
    ]
    assert len({base, *(load("digits", **change).fingerprint for change in changes)}) == 6
    assert load("digits", augment={"crop": 1}, root="/nowhere", workers=0).fingerprint == base


# .npz


def arrays(**changes):
    rng = np.random.default_rng(0)
    whole = {
        "x_train": rng.integers(0, 256, (40, 6, 5, 3), dtype=np.uint8),
        "y_train": np.arange(40) % 4,
        "x_test": rng.integers(0, 256, (8, 6, 5, 3), dtype=np.uint8),
        "y_test": np.arange(8) % 4,
    }
    return {key: array for key, array in (whole | changes).items() if array is not None}


def saved(folder, **changes):
    file = folder / "set.npz"
    np.savez(file, **arrays(**changes))
    return file


def read_back(d):
    """The raw test images of a loader, from its normalised ones."""
    x = torch.cat([x for x, _ in d.test])
    return x * d.test.std[:, None, None] + d.test.mean[:, None, None]


def test_npz_uint8_channels_last(tmp_path):
    d = load("npz", path=str(saved(tmp_path)), batch_size=6, validation=0.2)
    assert (d.num_classes, d.in_channels, d.image_size) == (4, 3, (6, 5))
    assert d.sizes == {"train": 32, "validation": 8, "test": 8}
    assert d.train.x.dtype == torch.uint8
    expected = torch.from_numpy(arrays()["x_test"]).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(read_back(d), expected, rtol=0, atol=1e-3)
    assert torch.cat([y for _, y in d.test]).tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert d.train.augment == Augment()


def test_npz_uint8_without_channels(tmp_path):
    x = arrays()
    d = load(
        "npz",
        root=saved(tmp_path, x_train=x["x_train"][..., 0], x_test=x["x_test"][..., 0]).parent,
        batch_size=6,
    )
    assert (d.in_channels, d.image_size) == (1, (6, 5))
    torch.testing.assert_close(read_back(d)[:, 0], torch.from_numpy(x["x_test"][..., 0]).float(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", ["<f4", ">f8", "f2"])
def test_npz_floating_channels_first(tmp_path, dtype):
    rng = np.random.default_rng(0)
    x = {key: rng.normal(size=(n, 2, 6, 5)).astype(dtype) for key, n in (("x_train", 40), ("x_test", 8))}
    saved(tmp_path, **x, y_train=(np.arange(40) % 4).astype(np.uint8))
    d = load("npz", root=tmp_path, path="set.npz", batch_size=6)
    assert d.train.x.dtype == torch.float32
    torch.testing.assert_close(read_back(d), torch.from_numpy(x["x_test"].astype(np.float32)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 6, 8), (5, 6, 5), (3, 3, 3), (1, 8, 4), (2, 6, 3), (6, 6, 6), (8, 6, 5)])
def test_npz_floating_images_of_any_form_with_channels_first(tmp_path, shape):
    x = {"x_train": np.zeros((40, *shape), F32), "x_test": np.zeros((8, *shape), F32)}
    d = load("npz", path=str(saved(tmp_path, **x)), batch_size=6)
    assert (d.in_channels, *d.image_size) == shape


def test_npz_with_a_class_per_pixel(tmp_path):
    y = {key: np.arange(n * 30).reshape(n, 6, 5) % 3 for key, n in (("y_train", 40), ("y_test", 8))}
    y["y_train"][0, 0, 0] = y["y_test"][0, 0, 0] = 255  # of no class
    d = load("npz", path=str(saved(tmp_path, **y)), batch_size=6, validation=0.2)
    assert (d.num_classes, d.sizes) == (3, {"train": 32, "validation": 8, "test": 8})
    assert torch.equal(torch.cat([y for _, y in d.test]), torch.from_numpy(y["y_test"]))
    with pytest.raises(ValueError, match=r"augment\.flip` must be .* but got 0 and True with .*\(36, 6, 5\)"):
        load("npz", path=str(tmp_path / "set.npz"), batch_size=6, augment={"flip": True})
    assert load("npz", path=str(tmp_path / "set.npz"), batch_size=6, augment={"cutout": 2}).train.augment.cutout == 2


@pytest.mark.parametrize(("highest", "dtype"), [(254, torch.uint8), (300, torch.int64)])
def test_masks_are_held_small_and_given_as_int64(tmp_path, highest, dtype):
    y = {key: np.arange(n * 30).reshape(n, 6, 5) % 200 for key, n in (("y_train", 40), ("y_test", 8))}
    y["y_train"][3, 2, 1], y["y_test"][0, 0, 0] = highest, 255
    d = load("npz", path=str(saved(tmp_path, **y)), batch_size=6, num_classes=301, augment={"cutout": 2})
    assert (d.train.y.dtype, d.test.y.dtype) == (dtype, torch.uint8)
    for loader in (d.train, d.validation, d.test):
        assert {batch.dtype for _, batch in loader} == {torch.int64}
    assert torch.equal(torch.cat([batch for _, batch in d.test]), torch.from_numpy(y["y_test"]))
    held = torch.cat([batch for _, batch in d.train] + [batch for _, batch in d.validation])
    assert held.max() == highest
    with pytest.raises(ValueError, match=f"labels in y_train must be in 0 .. 199, but one is {highest}"):
        load("npz", path=str(tmp_path / "set.npz"), num_classes=200)


def test_fingerprints_are_of_the_values_of_masks_however_they_are_held():
    mask = torch.arange(600 * 6).view(600, 2, 3) % 256
    assert data.catalog._fingerprint("", mask.to(torch.uint8)) == data.catalog._fingerprint("", mask)
    images = torch.zeros(2, 1, 2, 3, dtype=torch.uint8)
    assert data.catalog._fingerprint("", images) != data.catalog._fingerprint("", images.long())


def test_npz_with_values(tmp_path):
    y = {key: np.random.default_rng(0).normal(size=(n, 2)) for key, n in (("y_train", 40), ("y_test", 8))}
    d = load("npz", path=str(saved(tmp_path, **y)), batch_size=6)
    assert d.num_classes is None
    assert torch.equal(torch.cat([y for _, y in d.test]), torch.from_numpy(y["y_test"]).float())
    with pytest.raises(ValueError, match="y_train is floating, so that num_classes must be null, but it is 3"):
        load("npz", path=str(tmp_path / "set.npz"), num_classes=3)


def test_shapes_have_the_classes_that_they_show():
    d = load("shapes", batch_size=32)
    assert (d.num_classes, d.in_channels, d.image_size) == (4, 3, (32, 32))
    assert d.train.y.unique().tolist() == [0, 1, 2, 3]
    assert d.train.x.shape == (*d.train.y.shape[:1], 3, 32, 32)
    light = d.train.x.float().mean(1)
    assert light[d.train.y == 0].mean() == pytest.approx(100, abs=1)  # the background's
    assert light[d.train.y > 0].mean() > 150
    assert not torch.equal(d.train.x[:100], d.test.x[:100])
    assert load("shapes", batch_size=32).fingerprint == d.fingerprint


def test_npz_root_by_environment(tmp_path, monkeypatch):
    saved(tmp_path)
    monkeypatch.setenv("NAS_GATE_DATA", str(tmp_path))
    assert load("npz", batch_size=6).sizes["test"] == 8


def test_npz_num_classes_given(tmp_path):
    file = saved(tmp_path, y_train=np.arange(40) % 3 * 2, y_test=np.full(8, 4))
    assert load("npz", path=str(file), num_classes=6, batch_size=6).num_classes == 6


def test_npz_fingerprint_sees_the_pixels(tmp_path):
    base = load("npz", path=str(saved(tmp_path)), batch_size=6).fingerprint
    x = arrays()["x_train"]
    x[3, 2, 1, 0] ^= 1
    assert load("npz", path=str(saved(tmp_path, x_train=x)), batch_size=6).fingerprint != base


F32 = np.float32


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"y_test": None}, "y_test is not in"),
        ({"y_train": np.arange(39) % 4}, "x_train and y_train must be of one length.* 40 and 39"),
        ({"y_train": np.arange(40) % 4 - 1}, "labels in y_train must be >= 0, but one is -1"),
        ({"y_train": np.arange(40) % 4 + 1}, "each at least once, but there are 4 different ones in 1 .. 4"),
        ({"y_test": np.arange(8)}, "labels in y_test must be in 0 .. 3, but one is 7"),
        ({"y_train": np.arange(40) / 4}, r"y_train and y_test must agree .*float32 and \(\) torch\.int64"),
        ({"y_train": np.arange(40)[:, None] % 4}, r"y_train must be integers of shape N or N x H x W, .*\(40, 1\)"),
        (
            {"y_train": np.array(["a"] * 40)},
            "y_train must be integers of shape N or N x H x W, or floating, but got <U1",
        ),
        ({"y_train": np.full(40, np.nan)}, "the values in y_train must be finite"),
        ({"y_train": np.zeros((40, 5, 6), int)}, r"must have the height and width of the images, \(6, 5\), but has"),
        ({"y_train": np.full((40, 6, 5), 255), "y_test": np.zeros((8, 6, 5), int)}, "all its pixels are 255"),
        ({"y_train": np.zeros((40, 6, 5), int), "y_test": np.ones((8, 6, 5), int)}, "must be in 0 .. 0, but one is 1"),
        ({"x_train": np.zeros((40, 6, 5, 3), np.int64)}, "x_train must be uint8 .* but got int64"),
        (
            {"x_train": np.zeros((40, 6, 5), F32)},
            r"x_train must be uint8 .* but got float32 of shape \(40, 6, 5\)",
        ),
        ({"x_train": np.zeros((40, 3, 6, 5), np.uint8)}, "N x H x W x C with fewer channels"),
        *(
            ({"x_train": np.zeros(shape, F32)}, r"channels first, .*N x H x W x C, x\.transpose\(0, 3, 1, 2\)")
            for shape in ((40, 6, 6, 3), (40, 6, 8, 3), (40, 8, 6, 4), (40, 6, 6, 5), (40, 6, 8, 1))
        ),
        ({"x_train": np.full((40, 3, 6, 5), np.nan, F32)}, "images in x_train must be finite"),
        ({"x_test": np.zeros((8, 6, 6, 3), np.uint8)}, "must agree in image shape and type"),
        ({"x_test": np.zeros((8, 3, 6, 5), F32)}, "must agree in image shape and type"),
        ({"x_train": np.array([None] * 40)}, r"x_train cannot be read; .* \(objects are refused\)"),
        (
            {"x_test": np.zeros((0, 6, 5, 3), np.uint8), "y_test": np.zeros(0, int)},
            "at least 1, but got 0 and 0",
        ),
    ],
)
def test_npz_errors_name_the_file_and_the_rule(tmp_path, changes, rule):
    file = saved(tmp_path, **changes)
    with pytest.raises(ValueError, match=rule) as error:
        load("npz", path=str(file), batch_size=6)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("spoil", [lambda b: b[: len(b) // 2], lambda b: b"not a zip", lambda b: b""])
def test_npz_that_is_not_intact(tmp_path, spoil):
    file = saved(tmp_path)
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(ValueError, match=r"set\.npz: x_train cannot be read"):
        load("npz", path=str(file))


def test_npz_that_is_a_single_array(tmp_path):
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    with pytest.raises(ValueError, match=r"one\.npz: x_train cannot be read"):
        load("npz", root=tmp_path)


def test_npz_to_choose_from(tmp_path):
    with pytest.raises(FileNotFoundError, match="but got none"):
        load("npz", root=tmp_path)
    for name in ("a", "b"):
        np.savez(tmp_path / name, **arrays())
    with pytest.raises(FileNotFoundError, match=r"but got a\.npz, b\.npz"):
        load("npz", root=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"c\.npz nor .*c\.npz"):
        load("npz", root=tmp_path, path="c.npz")


# torchvision's sets, from tiny files in their real formats


def write_idx(file, array):
    magic = struct.pack(">HBB", 0, 8, array.ndim)
    file.write_bytes(magic + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes())


def write_mnist(folder, labels=None):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, n in (("train", 40), ("t10k", 20)):
        write_idx(folder / f"{part}-images-idx3-ubyte", rng.integers(0, 256, (n, 28, 28), dtype=np.uint8))
        write_idx(folder / f"{part}-labels-idx1-ubyte", (np.arange(n) % 10).astype(np.uint8))


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_files(tmp_path, name, folder):
    write_mnist(tmp_path / folder / "raw")
    d = load(name, root=tmp_path, batch_size=10, validation=0.25)
    assert d.sizes == {"train": 30, "validation": 10, "test": 20}
    assert (d.in_channels, d.image_size, d.num_classes) == (1, (28, 28), 10)
    assert d.test.y.tolist() == [n % 10 for n in range(20)]


def test_mnist_file_that_is_cut_short(tmp_path):
    write_mnist(tmp_path / "MNIST" / "raw")
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises((ValueError, FileNotFoundError), match=f"MNIST.*{tmp_path}"):
        load("mnist", root=tmp_path)


def test_mnist_images_and_labels_that_do_not_pair(tmp_path):
    write_mnist(tmp_path / "MNIST" / "raw")
    write_idx(tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte", np.full(39, 3, np.uint8))
    with pytest.raises(ValueError, match="40 images and 39 labels"):
        load("mnist", root=tmp_path)


def write_cifar(folder, names, key):
    folder.mkdir()
    x = np.random.default_rng(0).integers(0, 256, (20, 3, 32, 32), dtype=np.uint8)
    for name in names:
        (folder / name).write_bytes(pickle.dumps({"data": x.reshape(20, -1), key: [n % 10 for n in range(20)]}))
    return torch.from_numpy(x)


def test_cifar_integrity_is_torchvisions(tmp_path):
    write_cifar(tmp_path / "cifar-10-batches-py", [f"data_batch_{n}" for n in range(1, 6)], "labels")
    with pytest.raises(FileNotFoundError, match="not found or corrupted"):
        load("cifar10", root=tmp_path)


@pytest.mark.parametrize(
    ("name", "kind", "folder", "key", "meta"),
    [
        ("cifar10", "CIFAR10", "cifar-10-batches-py", "labels", "label_names"),
        ("cifar100", "CIFAR100", "cifar-100-python", "fine_labels", "fine_label_names"),
    ],
)
def test_cifar_layout(tmp_path, monkeypatch, name, kind, folder, key, meta):
    import torchvision.datasets

    kind = getattr(torchvision.datasets, kind)
    monkeypatch.setattr(kind, "train_list", [["one", None]])  # the checksums are those of the real files
    monkeypatch.setattr(kind, "test_list", [["two", None]])
    monkeypatch.setattr(kind, "meta", {"filename": "meta", "key": meta, "md5": None})
    x = write_cifar(tmp_path / folder, ["one", "two"], key)
    (tmp_path / folder / "meta").write_bytes(pickle.dumps({meta: list("abcdefghij")}))
    d = load(name, root=tmp_path, batch_size=10, validation=0.5)
    assert torch.equal(d.test.x, x)
    assert (d.num_classes, d.image_size) == ({"cifar10": 10, "cifar100": 100}[name], (32, 32))
    assert d.train.augment == Augment(crop=4, flip=True)


def test_svhn_layout(tmp_path, monkeypatch):
    import scipy.io
    from torchvision.datasets import SVHN

    x = np.random.default_rng(0).integers(0, 256, (20, 3, 32, 32), dtype=np.uint8)
    files = {part: ["", f"{part}_32x32.mat", None] for part in ("train", "test")}
    monkeypatch.setattr(SVHN, "split_list", files)
    for _, file, _ in files.values():
        y = np.array([n % 10 + 1 for n in range(20)])[:, None]  # 10 stands for the digit 0
        scipy.io.savemat(tmp_path / file, {"X": x.transpose(2, 3, 1, 0), "y": y})
    d = load("svhn", root=tmp_path, batch_size=10, validation=0.5)
    assert torch.equal(d.test.x, torch.from_numpy(x))
    assert d.test.y.tolist() == [(n + 1) % 10 for n in range(20)]


# Streamed image files


@pytest.fixture
def images(tmp_path):
    from torchvision.transforms.v2.functional import to_pil_image

    rng = torch.Generator().manual_seed(0)
    for part, n in (("train", 10), ("val", 3)):
        for name in ("cat", "dog"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(n):
                image = torch.randint(0, 256, (3, 20, 24), dtype=torch.uint8, generator=rng)
                to_pil_image(image).save(folder / f"{i}.png")
    return tmp_path


def load_images(root, **arguments):
    return load(
        "image_folder",
        **({"root": root, "image_size": 16, "batch_size": 4, "validation": 0.2, "workers": 0} | arguments),
    )


def test_image_folder(images):
    d = load_images(images)
    assert d.sizes == {"train": 16, "validation": 4, "test": 6}
    assert (d.num_classes, d.in_channels, d.image_size) == (2, 3, (16, 16))
    assert not {path for path, _ in d.train.samples} & {path for path, _ in d.validation.samples}
    assert torch.cat([y for _, y in d.validation]).tolist() == [0, 0, 1, 1]
    x, y = next(iter(d.train))
    assert (x.shape, x.dtype, y.dtype) == ((4, 3, 16, 16), torch.float32, torch.int64)


def test_image_folder_evaluation_pixels(images):
    from torchvision.datasets.folder import default_loader
    from torchvision.transforms.v2.functional import pil_to_tensor

    d = load_images(images, resize=20)  # the shorter side already: only the centre is cut out
    x, _ = next(iter(d.test))
    raw = pil_to_tensor(default_loader(images / "val" / "cat" / "0.png"))[:, 2:18, 4:20] / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(x[0], (raw - mean[:, None, None]) / std[:, None, None], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("suffix", "mode"), [("png", "I;16"), ("tif", "I;16"), ("tif", "I;16B")])
def test_grey_images_of_16_bits_are_scaled_to_8(tmp_path, suffix, mode):
    from PIL import Image

    values = np.array([[0, 128, 129, 257], [1000, 32767, 65406, 65535]], np.uint16)
    file = tmp_path / f"deep.{suffix}"
    order = values.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
    Image.frombytes(mode, (4, 2), order).save(file)
    with Image.open(file) as image:
        assert image.mode == mode
    pixels = np.asarray(data.sources.read_image(str(file)))
    assert pixels.shape == (2, 4, 3)
    assert pixels[..., 0].tolist() == [[0, 0, 1, 1], [4, 127, 254, 255]]  # 65406 / 257 is 254.498
    assert (pixels == pixels[..., :1]).all()


@pytest.mark.parametrize("mode", ["I", "F"])
def test_images_of_32_bits_are_refused(images, mode):
    from PIL import Image

    for file in (images / "val" / "cat").iterdir():
        file.unlink()
    file = images / "val" / "cat" / "deep.tif"
    Image.new(mode, (20, 24), 3).save(file)
    with pytest.raises(ValueError, match=f"{file}: this image .*8 bits a channel.*its mode is {mode}"):
        list(load_images(images).test)


def test_images_of_8_bits_are_read_as_torchvision_reads_them(tmp_path):
    from PIL import Image
    from torchvision.datasets.folder import default_loader

    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 4), dtype=np.uint8)
    for mode in ("L", "LA", "RGB", "RGBA", "1"):
        file = str(tmp_path / f"{mode}.png")
        Image.fromarray(pixels).convert(mode).save(file)
        assert np.array_equal(data.sources.read_image(file), default_loader(file))


def test_image_folder_is_resumable_and_leaves_the_global_generator_alone(images):
    before = torch.get_rng_state()
    epochs = [epoch_of(load_images(images).train, e) for e in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert same(epoch_of(load_images(images).train, 1), epochs[1])
    assert not same(*epochs)


# Python 3.12 and later warn of a fork beside torch's threads; the readers never use those.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_image_folder_workers_change_nothing(images):
    alone, helped = load_images(images), load_images(images, workers=2)
    assert same(epoch_of(helped.train, 3), epoch_of(alone.train, 3))
    assert same(list(helped.test), list(alone.test))
    assert helped.fingerprint == alone.fingerprint


def test_image_folder_fingerprint_sees_sizes_but_not_where_the_set_lies(images, tmp_path):
    base = load_images(images).fingerprint
    elsewhere = tmp_path / "elsewhere"
    for part in ("train", "val"):
        shutil.copytree(images / part, elsewhere / part)
    assert load_images(elsewhere).fingerprint == base
    file = elsewhere / "val" / "dog" / "1.png"
    file.write_bytes(file.read_bytes() + b"0")
    assert load_images(elsewhere).fingerprint != base


def test_empty_image_files_are_refused_before_any_is_read(images):
    file = images / "val" / "dog" / "1.png"
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=f"{file}: an image file must not be empty"):
        load_images(images)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("spoil", [lambda b: b[: len(b) // 2], lambda b: b"no image", lambda b: b[:40] + b"x" + b[41:]])
def test_a_broken_image_is_named(images, workers, spoil):
    file = images / "val" / "dog" / "1.png"
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(ValueError, match=f"{file}: this image cannot be read: "):
        list(load_images(images, workers=workers).test)


def test_an_image_that_is_gone_is_named(images):
    loader = load_images(images).test
    (images / "val" / "dog" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"dog/1\.png: this image cannot be read: "):
        list(loader)


def test_image_folder_augmentation(images):
    whole = {"scale": 1.0, "flip": False}
    plain = epoch_of(load_images(images, augment="none").train)
    assert same(plain, epoch_of(load_images(images, augment="none").train))
    assert not same(plain, epoch_of(load_images(images, augment=whole).train))
    assert len({load_images(images, augment=a).fingerprint for a in ("default", "none", whole)}) == 3


def test_image_folder_shards(images):
    loader = load_images(images).train
    shards = [epoch_of(loader.shard(rank, 2), 1) for rank in range(2)]
    for (x, y), (x0, y0), (x1, y1) in zip(epoch_of(loader, 1), *shards, strict=True):
        assert torch.equal(torch.stack([y0, y1], 1).flatten(), y)
        torch.testing.assert_close(torch.stack([x0, x1], 1).flatten(0, 1), x, rtol=0, atol=0)


def test_image_folder_to_device(images):
    assert [x.device.type for x, _ in load_images(images).test.to("meta")] == ["meta", "meta"]


def test_image_folder_errors(images):
    (images / "val" / "cat").rename(images / "val" / "cow")
    with pytest.raises(ValueError, match=r"must be the same.*cat, cow"):
        load_images(images)
    (images / "train").rename(images / "training")
    with pytest.raises(FileNotFoundError, match=f"train/ of class folders in {images}"):
        load_images(images)
    (images / "train" / "cat").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="Found no valid file for the classes cat"):
        load_images(images)


def test_imagenet_without_its_files(images):
    with pytest.raises(FileNotFoundError, match=f"no intact set in {images}.*ILSVRC2012_devkit"):
        load("imagenet", root=images)


# Shipped configurations


def test_every_set_has_a_configuration():
    assert {file.stem for file in CONF.glob("*.yaml")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_configuration_is_keywords_of_load(name, monkeypatch):
    values = OmegaConf.load(CONF / f"{name}.yaml")
    plain = OmegaConf.to_container(values, resolve=True)
    assert plain["name"] == name
    own = NAMES[name]
    general = {"name", "root", "batch_size", "validation", "augment", "download", "workers"}
    assert plain.keys() <= general | set(own.reading + own.streaming)
    assert type(own.augment)(**plain["augment"]) == own.augment
    if name not in ("digits", "shapes"):
        assert plain["root"] is None
        monkeypatch.setenv("NAS_GATE_DATA", "/some/where")
        assert values.root == "/some/where"
        with pytest.raises(FileNotFoundError, match="/some/where"):
            load(**values)


def test_digits_configuration_loads():
    values = OmegaConf.load(CONF / "digits.yaml")
    assert load(**values).fingerprint == load("digits", batch_size=64).fingerprint
