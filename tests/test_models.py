"""Figures of the CIFAR networks by hand arithmetic, option A, the torchvision names, the errors."""

import copy
import sys
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as zoo
import yaml
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nas_gate import models
from nas_gate.models.cifar import ZeroPadShortcut

CONF = Path(__file__).parents[1] / "conf" / "model"
CIFAR_NAMES = (
    *("resnet20", "resnet32", "resnet44", "resnet56", "resnet110"),
    *("cifar_vgg16_bn", "densenet40", "cifar_mobilenet_v2"),
)


def macs(model: nn.Module, *shape: int) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(shape, device=next(model.parameters()).device))
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


def numel(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def on_meta(name: str, **arguments: object) -> nn.Module:
    with torch.device("meta"):
        return models.build(name, **arguments)


# --- figures of the literature's networks -------------------------------------------------------------------


def conv(k: int, channels: int, out: int, size: int, bn_of: str = "out") -> tuple[int, int]:
    """(MACs, parameters) of a bias-free k x k convolution with size x size results, and of its batch norm."""
    weight = k * k * channels * out
    return weight * size * size, weight + 2 * {"out": out, "in": channels, "none": 0}[bn_of]


def total(layers: list[tuple[int, int]]) -> tuple[int, int]:
    return sum(m for m, _ in layers), sum(p for _, p in layers)


def linear(channels: int, out: int) -> tuple[int, int]:
    return channels * out, channels * out + out


def resnet_by_hand(depth: int, shortcut: str = "A") -> tuple[int, int]:
    n = (depth - 2) // 6
    layers = [conv(3, 3, 16, 32)] + 2 * n * [conv(3, 16, 16, 32)]
    for before, out, size in ((16, 32, 16), (32, 64, 8)):
        layers += [conv(3, before, out, size)] + (2 * n - 1) * [conv(3, out, out, size)]
        layers += [conv(1, before, out, size)] if shortcut == "B" else []
    return total([*layers, linear(64, 10)])


@pytest.mark.parametrize(
    ("depth", "shortcut"), [(20, "A"), (32, "A"), (44, "A"), (56, "A"), (110, "A"), (20, "B"), (56, "B")]
)
def test_resnet_figures(depth: int, shortcut: str) -> None:
    model = on_meta(f"resnet{depth}", shortcut=shortcut)
    assert (macs(model, 1, 3, 32, 32), numel(model)) == resnet_by_hand(depth, shortcut)


def test_published_figures() -> None:
    """He et al. 2015, table 6 (0.27 M to 1.7 M parameters), and the MACs that pruning papers start from."""
    assert [round(resnet_by_hand(d)[1] / 1e6, 2) for d in (20, 32, 44, 56, 110)] == [
        0.27,
        0.46,
        0.66,
        0.85,
        1.73,
    ]
    assert round(resnet_by_hand(56)[0] / 1e6, 2) == 125.49
    assert resnet_by_hand(20)[0] == 40_551_040


def test_vgg16_figures() -> None:
    plan = [(3, 64, 32), (64, 64, 32), (64, 128, 16), (128, 128, 16), (128, 256, 8), *2 * [(256, 256, 8)]]
    plan += [(256, 512, 4), *2 * [(512, 512, 4)], *3 * [(512, 512, 2)]]
    expected = total([*(conv(3, *layer) for layer in plan), linear(512, 10)])
    assert [round(x / 1e6, 1) for x in expected] == [313.2, 14.7]
    model = on_meta("cifar_vgg16_bn")
    assert (macs(model, 1, 3, 32, 32), numel(model)) == expected


def test_densenet40_figures() -> None:
    layers, channels = [conv(3, 3, 16, 32, "none")], 16
    for size in (32, 16, 8):
        layers += [conv(3, channels + 12 * i, 12, size, "in") for i in range(12)]
        channels += 12 * 12
        layers += [conv(1, channels, channels, size, "in")] if size > 8 else []
    assert channels == 448
    expected = total([*layers, (0, 2 * channels), linear(channels, 10)])
    assert round(expected[1] / 1e6, 1) == 1.0  # Huang et al. 2016, table 2
    model = on_meta("densenet40")
    assert (macs(model, 1, 3, 32, 32), numel(model)) == expected


def mobilenet_by_hand() -> tuple[int, int]:
    def block(channels: int, out: int, expansion: int, size: int, stride: int) -> list[tuple[int, int]]:
        hidden, after = channels * expansion, size // stride
        depthwise = (9 * hidden * after * after, 9 * hidden + 2 * hidden)
        expand = [conv(1, channels, hidden, size)] if expansion > 1 else []
        return [*expand, depthwise, conv(1, hidden, out, after)]

    layers = [conv(3, 3, 32, 32), *block(32, 16, 1, 32, 1)]
    layers += [*block(16, 24, 6, 32, 1), *block(24, 24, 6, 32, 1)]
    layers += [*block(24, 32, 6, 32, 2), *2 * block(32, 32, 6, 16, 1)]
    layers += [*block(32, 64, 6, 16, 2), *3 * block(64, 64, 6, 8, 1)]
    layers += [*block(64, 96, 6, 8, 1), *2 * block(96, 96, 6, 8, 1)]
    layers += [*block(96, 160, 6, 8, 2), *2 * block(160, 160, 6, 4, 1), *block(160, 320, 6, 4, 1)]
    return total([*layers, conv(1, 320, 1280, 4), linear(1280, 10)])


def test_mobilenet_figures() -> None:
    model = on_meta("cifar_mobilenet_v2")
    assert (macs(model, 1, 3, 32, 32), numel(model)) == mobilenet_by_hand()


@pytest.mark.parametrize("width", [0.35, 0.5, 0.75, 1.0, 1.4])
def test_mobilenet_has_torchvisions_parameters(width: float) -> None:
    """Only strides differ from the network for 224x224, so torchvision's is an oracle for the parameters."""
    ours = on_meta("cifar_mobilenet_v2", width=width)
    assert numel(ours) == numel(on_meta("mobilenet_v2", num_classes=10, width_mult=width))


def test_digits_cnn_figures() -> None:
    layers = [conv(3, 1, 24, 8), *2 * [conv(3, 24, 24, 8)]]
    for before, out, size in ((24, 48, 4), (48, 96, 2)):
        layers += [conv(3, before, out, size), conv(3, out, out, size), conv(1, before, out, size)]
    model = on_meta("digits_cnn")
    assert (macs(model, 1, 1, 8, 8), numel(model)) == total([*layers, linear(96, 10)])


def test_shapes_fcn_figures() -> None:
    layers = [conv(3, 3, 16, 32), conv(3, 16, 32, 16), conv(3, 32, 32, 16), conv(3, 32, 64, 8), conv(3, 64, 64, 8)]
    model = on_meta("shapes_fcn")
    classifier = (64 * 4 * 8 * 8, 64 * 4 + 4)
    assert (macs(model, 1, 3, 32, 32), numel(model)) == total([*layers, classifier])
    assert models.build("shapes_fcn", num_classes=7, in_channels=1)(torch.zeros(2, 1, 8, 12)).shape == (2, 7, 8, 12)


@pytest.mark.parametrize("name", CIFAR_NAMES)
def test_cifar_networks_take_classes_channels_and_train(name: str) -> None:
    model = models.build(name, num_classes=7, in_channels=2)
    logits = model(torch.randn(2, 2, 32, 32))
    assert logits.shape == (2, 7)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    used: list[nn.Module] = []
    hooks = [m.register_forward_hook(lambda m, *_: used.append(m)) for m in model.modules()]
    with torch.no_grad():
        model(torch.randn(2, 2, 32, 32))
    assert len(used) == len(set(used)) == len(hooks)  # every module once: no batch norm serves two places


def test_width_scales_every_stage() -> None:
    half = models.build("resnet20", width=0.5)
    assert numel(half) == numel(models.build("resnet20", widths=[8, 16, 32]))
    assert half(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert models.build("cifar_vgg16_bn", width=0.125)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


# --- option A ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "out"), [(16, 32), (3, 8), (5, 5), (4, 5)])
@pytest.mark.parametrize("stride", [1, 2])
def test_zero_pad_shortcut_equals_pad(channels: int, out: int, stride: int) -> None:
    shortcut = ZeroPadShortcut(channels, out, stride)
    assert not list(shortcut.parameters())
    assert not shortcut.state_dict()
    before = (out - channels) // 2
    for layout in (torch.contiguous_format, torch.channels_last):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            x = torch.randn(2, channels, 9, 8, dtype=dtype).to(memory_format=layout).requires_grad_()
            y = shortcut(x)
            expected = F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, before, out - channels - before))
            assert y.dtype == dtype
            assert y.is_contiguous(memory_format=layout)
            assert torch.equal(y, expected)
            weight = torch.randn_like(y)
            assert torch.equal(torch.autograd.grad(y, x, weight)[0], torch.autograd.grad(expected, x, weight)[0])


def test_zero_pad_shortcut_follows_its_cut_buffers() -> None:
    """Cutting channels of the stream is cutting the input and the buffers; no attribute needs mending."""
    torch.manual_seed(0)
    for _ in range(5):
        shortcut = ZeroPadShortcut(6, 12, 2)
        keep = torch.rand(12) < 0.5
        x = torch.randn(2, 6, 8, 8)
        full = shortcut(x)
        shortcut.before = shortcut.before[:, keep[:3]]
        shortcut.after = shortcut.after[:, keep[9:]]
        assert torch.equal(shortcut(x[:, keep[3:9]]), full[:, keep])


def test_zero_pad_shortcut_may_lose_all_its_zeros() -> None:
    shortcut = ZeroPadShortcut(4, 8, 1)
    shortcut.before, shortcut.after = shortcut.before[:, :0], shortcut.after[:, :0]
    x = torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last)
    assert torch.equal(shortcut(x), x)


def test_resnet_under_autocast_and_channels_last() -> None:
    model = models.build("resnet20").to(memory_format=torch.channels_last)
    layouts, dtypes = [], []
    for block in (m for m in model.modules() if isinstance(m, ZeroPadShortcut)):
        block.register_forward_hook(lambda _, __, y: layouts.append(y.stride()[1]) or dtypes.append(y.dtype))
    x = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x).float().sum().backward()
    assert dtypes == [torch.bfloat16] * 2
    assert layouts == [1, 1]


def test_zero_pad_shortcut_exports_with_a_free_batch_size() -> None:
    shortcut = ZeroPadShortcut(4, 8, 2)
    batch = torch.export.Dim("batch", min=2, max=64)
    example = (torch.randn(4, 4, 8, 8),)
    program = torch.export.export(shortcut, example, dynamic_shapes=({0: batch},), strict=False)
    x = torch.randn(7, 4, 8, 8)
    assert torch.equal(program.module()(x), shortcut(x))


# --- names -------------------------------------------------------------------------------------------------


def test_names() -> None:
    names = models.names()
    assert names == sorted(set(names))
    own = {"cifar_supernet", "digits_cnn", "shapes_fcn"}
    assert set(zoo.list_models(module=zoo)) | set(CIFAR_NAMES) | own == set(names)
    for name in names:
        assert models.accepts(name, "num_classes")
        assert models.accepts(name, "in_channels")
        assert not models.accepts(name, "nonsense")
    assert models.accepts("resnet18", "weights")
    assert not models.accepts("resnet20", "depth")


# One per distinct constructor or stem; RegNet alone cannot be built on the meta device (it computes its
# widths with tensors), so its small one is built.
FAMILIES = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet"),
    *("inception_v3", "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "resnet18", "resnet50"),
    *("resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "vgg11_bn"),
    *("vit_b_32", "wide_resnet50_2"),
)


@pytest.mark.parametrize("name", FAMILIES)
def test_torchvision_families(name: str) -> None:
    """One tensor out, of the classes asked for, and no warning."""
    model = on_meta(name, num_classes=7, in_channels=1)
    size = 299 if name == "inception_v3" else 224
    assert model.eval()(torch.zeros(2, 1, size, size, device="meta")).shape == (2, 7)


def test_regnet() -> None:
    model = models.build("regnet_y_400mf", num_classes=7, in_channels=1)
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 7)


def test_torchvision_name_is_torchvisions_model() -> None:
    torch.manual_seed(0)
    ours = models.build("squeezenet1_1", num_classes=5)
    torch.manual_seed(0)
    theirs = zoo.squeezenet1_1(num_classes=5)
    assert type(ours) is type(theirs)
    for (name, p), (name_too, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == name_too
        assert torch.equal(p, q)


def test_auxiliary_heads_only_when_asked() -> None:
    assert on_meta("googlenet").aux1 is None
    assert on_meta("inception_v3").AuxLogits is None
    assert on_meta("inception_v3", aux_logits=True).AuxLogits is not None


def last_map(model: nn.Module, size: int) -> int:
    """Height of the last convolution's result."""
    heights: list[int] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, __, y: heights.append(y.shape[2]))
    device = next(model.parameters()).device
    model.eval()(torch.zeros(2, 3, size, size, device=device))
    return [h for h in heights if h > 1][-1]  # squeeze-excitation has convolutions over 1x1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", 4),
        ("resnext50_32x4d", 4),
        ("wide_resnet50_2", 4),
        ("densenet121", 4),
        ("shufflenet_v2_x0_5", 4),
        ("convnext_tiny", 4),
        ("mobilenet_v2", 2),
        ("mobilenet_v3_small", 2),
        ("mnasnet0_5", 2),
        ("efficientnet_b0", 2),
    ],
)
def test_cifar_stem(name: str, expected: int) -> None:
    """The stem's reduction is gone: by 4 (convolution and pooling, or patches), by 2 without pooling.

    An ImageNet classifier reduces by 32, so 32x32 images end at 32 / (32 / 4) = 4, or 32 / (32 / 2) = 2.
    """
    model = on_meta(name, stem="cifar", num_classes=10)
    assert last_map(model, 32) == expected
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    assert (first.kernel_size, first.stride, first.padding) == ((3, 3), (1, 1), (1, 1))


def test_cifar_stem_of_regnet() -> None:
    assert last_map(models.build("regnet_y_400mf", stem="cifar"), 32) == 2


def test_cifar_stem_resnet18_macs() -> None:
    """The well-known ResNet-18 for CIFAR: 555.42 M MACs, 11.17 M parameters."""
    layers = [conv(3, 3, 64, 32), *4 * [conv(3, 64, 64, 32)]]
    for before, out, size in ((64, 128, 16), (128, 256, 8), (256, 512, 4)):
        layers += [conv(3, before, out, size), *3 * [conv(3, out, out, size)], conv(1, before, out, size)]
    expected = total([*layers, linear(512, 10)])
    assert [round(x / 1e6, 2) for x in expected] == [555.42, 11.17]
    model = on_meta("resnet18", stem="cifar", num_classes=10)
    assert (macs(model, 1, 3, 32, 32), numel(model)) == expected


@pytest.mark.parametrize("name", ["alexnet", "vgg16_bn", "vit_b_16", "swin_t", "inception_v3", "squeezenet1_0"])
def test_cifar_stem_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"stem='cifar' is there for the families resnet, .*cifar_vgg16_bn"):
        models.build(name, stem="cifar")


# --- pretrained weights, from a cache folder filled here ---------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def offline(url: str, *_: object, **__: object) -> None:
        raise urllib.error.URLError(f"no network for {url}")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def fill(cache: Path, name: str, **arguments: object) -> nn.Module:
    """Put the weights of a fresh `name` where torchvision looks for the pretrained ones."""
    source = models.build(name, **arguments)
    url = zoo.get_model_weights(name).DEFAULT.url
    torch.save(source.state_dict(), cache / url.rpartition("/")[2])
    return source


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> set[str]:
    return {k for k in a if a[k].shape == b[k].shape and torch.equal(a[k], b[k])}


@pytest.mark.parametrize("weights", ["DEFAULT", "IMAGENET1K_V1", "SqueezeNet1_1_Weights.IMAGENET1K_V1"])
def test_weights_are_loaded(cache: Path, weights: str) -> None:
    source = fill(cache, "squeezenet1_1").state_dict()
    loaded = models.build("squeezenet1_1", weights=weights).state_dict()
    assert same(source, loaded) == set(source)


def test_weights_with_another_number_of_classes(cache: Path) -> None:
    for name, head in (("squeezenet1_1", "classifier.1"), ("mobilenet_v3_small", "classifier.3")):
        source = fill(cache, name).state_dict()
        model = models.build(name, weights="DEFAULT", num_classes=10)
        assert set(source) - same(source, model.state_dict()) == {f"{head}.weight", f"{head}.bias"}
        assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 10)


def test_weights_with_cifar_stem_keep_a_3x3_convolution(cache: Path) -> None:
    source = fill(cache, "mobilenet_v3_small").state_dict()
    model = models.build("mobilenet_v3_small", weights="DEFAULT", stem="cifar")
    assert same(source, model.state_dict()) == set(source)
    assert last_map(model, 32) == 2


@pytest.mark.parametrize("aux_logits", [None, False])
def test_weights_of_a_model_with_auxiliary_heads(cache: Path, aux_logits: bool | None) -> None:
    source = fill(cache, "googlenet", aux_logits=True, init_weights=False).state_dict()
    asked = {} if aux_logits is None else {"aux_logits": aux_logits}
    model = models.build("googlenet", weights="DEFAULT", num_classes=10, **asked)
    assert model.aux1 is None
    assert model.transform_input
    kept = {k for k in source if not k.startswith(("aux", "fc"))}
    assert same({k: source[k] for k in kept}, model.state_dict()) == kept
    assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 10)
    assert models.without_weights("googlenet", {"weights": "DEFAULT"}) == {
        "num_classes": 1000,
        "transform_input": True,
    }


def test_without_weights() -> None:
    """What each set of weights brings along: classes, image size."""
    assert models.without_weights("resnet18", {"weights": "DEFAULT", "num_classes": 10}) == {"num_classes": 10}
    assert models.without_weights("vit_b_16", {"weights": "IMAGENET1K_SWAG_E2E_V1"}) == {
        "num_classes": 1000,
        "image_size": 384,
    }
    assert models.without_weights("resnet18", {"stem": "cifar"}) == {"stem": "cifar"}
    assert models.without_weights("resnet20", {"width": 0.5}) == {"width": 0.5}


def test_weights_that_cannot_be_had(cache: Path) -> None:
    with pytest.raises(RuntimeError, match=r"'resnet18'.*IMAGENET1K_V1.*https://.*no network.*checkpoints"):
        models.build("resnet18", weights="DEFAULT")
    with pytest.raises(ValueError, match=r"unknown weights 'IMAGENET1K_V7'.*did you mean.*DEFAULT"):
        models.build("resnet18", weights="IMAGENET1K_V7")
    with pytest.raises(ValueError, match="need in_channels=3, but got 1"):
        models.build("resnet18", weights="DEFAULT", in_channels=1)


def test_weights_file_of_another_model(cache: Path) -> None:
    url = zoo.get_model_weights("squeezenet1_1").DEFAULT.url
    torch.save({"foreign": torch.zeros(1)}, cache / url.rpartition("/")[2])
    with pytest.raises(RuntimeError, match=r"'squeezenet1_1'.*could not be loaded"):
        models.build("squeezenet1_1", weights="DEFAULT")


# --- factories by import path ------------------------------------------------------------------------------


@pytest.fixture
def factory_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "my_factories.py").write_text(
        "from torch import nn\n"
        "def small(num_classes, hidden=4, **other):\n"
        "    return nn.Sequential(nn.Linear(3, hidden), nn.Linear(hidden, num_classes))\n"
        "class Space:\n"
        "    @staticmethod\n"
        "    def net():\n"
        "        return nn.Identity()\n"
        "def wrong():\n"
        "    return 'no module'\n"
        "number = 3\n"
    )
    (tmp_path / "my_broken.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_factories"
    for name in ("my_factories", "my_broken"):
        sys.modules.pop(name, None)


def test_factory_by_import_path(factory_module: str) -> None:
    model = models.build("my_factories:small", num_classes=5, hidden=6)
    assert model(torch.zeros(2, 3)).shape == (2, 5)
    assert isinstance(models.build("my_factories:Space.net"), nn.Identity)
    assert isinstance(models.build("torch.nn:Linear", in_features=2, out_features=3), nn.Linear)
    assert models.accepts("my_factories:small", "num_classes")
    assert not models.accepts("my_factories:small", "in_channels")  # **other is no promise
    assert models.without_weights("my_factories:small", {"weights": "mine"}) == {"weights": "mine"}


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        (
            "no_such_package.models:net",
            ImportError,
            r"cannot import module 'no_such_package\.models'.*PYTHONPATH",
        ),
        ("my_broken:net", ImportError, r"'my_broken:net'.*a_package_that_is_not_there"),
        ("my_factories:smal", ImportError, r"'my_factories' has no attribute 'smal'; close matches: small"),
        ("my_factories:Space.nett", ImportError, r"'my_factories\.Space' has no attribute 'nett'.*net"),
        ("my_factories:wrong", TypeError, r"must return an nn\.Module, but returned <class 'str'>"),
        ("my_factories:number", TypeError, r"must be callable, but is <class 'int'>"),
        ("my_factories:", ValueError, r"must read \"package\.module:factory\""),
        (":small", ValueError, r"must read \"package\.module:factory\""),
        ("my_factories:small", TypeError, r"missing a required argument: 'num_classes'; its arguments are"),
    ],
)
def test_factory_errors(factory_module: str, path: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        models.build(path)


# --- errors ------------------------------------------------------------------------------------------------


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'resnet55'; close matches: .*resnet56.*; valid names: "):
        models.build("resnet55")
    with pytest.raises(ValueError, match="unknown model 'qqq'; valid names: ") as error:
        models.accepts("qqq", "width")
    assert all(name in str(error.value) for name in models.names())


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("resnet20", {"depth": 32}, TypeError, "'resnet20'.*unexpected keyword argument 'depth'.*widths"),
        ("resnet18", {"widht": 2}, TypeError, "widht"),
        ("resnet20", {"num_classes": 0}, ValueError, "num_classes must be at least 1, but got 0"),
        ("resnet18", {"num_classes": 0}, ValueError, "num_classes must be at least 1, but got 0"),
        ("resnet18", {"in_channels": 0}, ValueError, "in_channels must be at least 1, but got 0"),
        ("resnet18", {"stem": "mnist"}, ValueError, 'must be "imagenet" or "cifar", but got \'mnist\''),
        ("resnet20", {"shortcut": "C"}, ValueError, 'must be "A" or "B", but got \'C\''),
        ("resnet20", {"width": 0.0}, ValueError, r"width must be above 0, but got 0\.0"),
        ("cifar_mobilenet_v2", {"width": -1.0}, ValueError, r"width must be above 0, but got -1\.0"),
        ("resnet20", {"widths": [8, 16]}, ValueError, r"one per stage, but got \[8, 16\]"),
        ("resnet20", {"widths": [32, 16, 8]}, ValueError, "got 16 after 32 channels; shortcut 'B'"),
        ("densenet40", {"growth": 0}, ValueError, "growth must be at least 1, but got 0"),
        ("cifar_vgg16_bn", {"in_channels": 0}, ValueError, "in_channels must be at least 1, but got 0"),
    ],
)
def test_refused_arguments(name: str, arguments: dict, error: type[Exception], message: str) -> None:
    given = copy.deepcopy(arguments)
    with pytest.raises(error, match=message):
        models.build(name, **arguments)
    assert arguments == given


def test_shortcut_b_can_narrow() -> None:
    model = models.build("resnet20", widths=[16, 8, 8], shortcut="B")
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


# --- shipped config ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_config(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    assert set(config) == {"name", "arguments"}
    if path.stem == "custom":
        assert config == {"name": "???", "arguments": {}}  # the user must name the factory
        return
    on_meta(config["name"], **config["arguments"])
    if path.stem != "torchvision":
        assert path.stem == config["name"]
        # every option is there to be set, at its default
        with_defaults, plain = on_meta(config["name"], **config["arguments"]), on_meta(config["name"])
        assert str(with_defaults) == str(plain)


def test_every_own_network_has_a_config() -> None:
    others = {"cifar_supernet", "digits_cnn", "shapes_fcn", "torchvision", "custom"}
    assert {p.stem for p in CONF.glob("*.yaml")} == {*CIFAR_NAMES, *others}


# --- weights from files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", [None, "module", "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_of_a_checkpoint(wrapper: str | None, prefix: str, tmp_path: Path) -> None:
    source, model = (models.build("digits_cnn", width=0.25) for _ in range(2))
    state = {f"{prefix}{name}": value for name, value in source.state_dict().items()}
    torch.save(state if wrapper is None else {"epoch": 3, wrapper: state}, tmp_path / "a.pt")
    models.load_weights(model, tmp_path / "a.pt")
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())


def test_weights_of_safetensors(tmp_path: Path) -> None:
    source, model = (models.build("digits_cnn", width=0.25) for _ in range(2))
    save_file(source.state_dict(), tmp_path / "a.safetensors")
    models.load_weights(model, str(tmp_path / "a.safetensors"))
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())


def test_names_that_begin_like_those_of_a_wrapper_stay(tmp_path: Path) -> None:
    source, model = (nn.ModuleDict({"module": nn.Linear(2, 2)}) for _ in range(2))
    torch.save(source.state_dict(), tmp_path / "a.pt")
    models.load_weights(model, tmp_path / "a.pt")
    assert torch.equal(model["module"].weight, source["module"].weight)


class Payload:
    """Nothing that weights may hold."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no weights", "cannot be read"),
        ({"weight": torch.ones(2, 3)}, "without 'bias' \\(1 such\\)$"),
        ({"weight": torch.ones(2, 3), "bias": torch.ones(2), "b": torch.ones(1)}, "with unknown 'b' \\(1 such\\)"),
        ({"weight": torch.ones(3, 2), "bias": torch.ones(2)}, "'weight' has shape \\(3, 2\\) there and \\(2, 3\\) in"),
        ({"weight": [1, 2]}, "must be a state dict of tensors"),
        ([1, 2], "must be a state dict of tensors"),
        ({"weight": Payload()}, "cannot be read"),
    ],
)
def test_weights_that_do_not_fit_leave_the_model_alone(content: object, message: str, tmp_path: Path) -> None:
    path, model = tmp_path / "a.pt", nn.Linear(3, 2)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        models.load_weights(model, path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_damaged_safetensors_are_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"a\.safetensors cannot be read"):
        models.load_weights(nn.Linear(3, 2), tmp_path / "a.safetensors")
