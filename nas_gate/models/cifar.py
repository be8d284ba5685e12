"""Networks of the literature for 32x32 images: ResNet, VGG-16-BN, DenseNet-40, MobileNetV2; and a supernet.

All map (N, in_channels, H, W) to (N, num_classes) logits and are made of plain `nn` modules, one batch norm
per use. MACs are multiply-accumulates of convolutions and linear layers for one 3x32x32 image, 10 classes.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from nas_gate.modules import Choice

Shortcut = Literal["A", "B"]


def resnet(
    depth: int,
    /,
    num_classes: int = 10,
    in_channels: int = 3,
    shortcut: Shortcut = "A",
    width: float = 1.0,
    widths: Sequence[int] = (16, 32, 64),
) -> nn.Module:
    """ResNet for CIFAR: three stages of (depth - 2) / 6 basic blocks at 32x32, 16x16 and 8x8.

    He, Zhang, Ren, Sun: "Deep Residual Learning for Image Recognition" (2015), section 4.2. With shortcut A:
    ResNet-20 40.55 M MACs and 0.27 M parameters, ResNet-56 125.49 M and 0.85 M, ResNet-110 252.89 M and
    1.73 M.

    Args:
        depth: 6 n + 2: 20, 32, 44, 56, 110.
        num_classes: outputs.
        in_channels: channels of the images.
        shortcut: where a stage begins, "A": subsample and pad with zero channels, no parameters (the paper's
            choice for CIFAR); "B": 1x1 convolution of stride 2 with batch norm.
        width: factor on `widths`, rounded.
        widths: channels of the three stages.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"ResNet for CIFAR: depth must be 6 n + 2 with n >= 1, but got {depth}")
    if len(widths) != 3:
        raise ValueError(f"ResNet for CIFAR: widths must be three, one per stage, but got {list(widths)}")
    blocks = ((depth - 2) // 6,) * 3
    channels = [scaled(w, width) for w in widths]
    return ResNet(blocks, channels, shortcut=shortcut, num_classes=num_classes, in_channels=in_channels)


def vgg16_bn(num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> nn.Module:
    """VGG-16 with batch norm and one linear classifier, 313.20 M MACs and 14.72 M parameters.

    The 13 convolutions of Simonyan and Zisserman (2014, configuration D), for 32x32 as the pruning literature
    has it since Liu et al. ("Learning Efficient Convolutional Networks through Network Slimming", 2017): no
    bias before batch norm, four poolings, global average pooling, one linear layer. Images of at least 16x16.

    Args:
        num_classes: outputs.
        in_channels: channels of the images.
        width: factor on all widths, rounded.
    """
    stages = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
    layers: list[nn.Module] = []
    channels = _positive(in_channels, "in_channels")
    for index, stage in enumerate(stages):
        if index:
            layers.append(nn.MaxPool2d(2))
        for out in (scaled(w, width) for w in stage):
            layers += [*_conv_bn(channels, out, 3), nn.ReLU()]
            channels = out
    return _initialised(nn.Sequential(*layers, *_head(channels, num_classes)))


def densenet40(num_classes: int = 10, in_channels: int = 3, growth: int = 12) -> nn.Module:
    """DenseNet of 40 layers, growth 12, no bottleneck, no compression: 264.81 M MACs, 1.02 M parameters.

    Huang, Liu, van der Maaten, Weinberger: "Densely Connected Convolutional Networks" (2016), section 3: a
    first convolution to 16 channels, three dense blocks of 12 layers, between them 1x1 convolutions and 2x2
    averages.

    Args:
        num_classes: outputs.
        in_channels: channels of the images.
        growth: channels that every layer adds.
    """
    _positive(growth, "growth")
    channels = 16
    layers: list[nn.Module] = [_conv(_positive(in_channels, "in_channels"), channels, 3)]
    for index in range(3):
        if index:
            layers += [*_bn_relu_conv(channels, channels, 1), nn.AvgPool2d(2)]
        for _ in range(12):
            layers.append(DenseLayer(channels, growth))
            channels += growth
    layers += [nn.BatchNorm2d(channels), nn.ReLU()]
    return _initialised(nn.Sequential(*layers, *_head(channels, num_classes)))


def mobilenet_v2(num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> nn.Module:
    """MobileNetV2 for 32x32 images, 87.98 M MACs and 2.24 M parameters.

    Table 2 of Sandler et al. ("MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018), with stride 1
    instead of 2 in the first convolution and in the stage of 24 channels, so that the last maps are 4x4.

    Args:
        num_classes: outputs.
        in_channels: channels of the images.
        width: factor on all widths (above 1 only on the last, as in the paper), rounded to a multiple of 8.
    """
    stages = (  # expansion, channels, blocks, stride of the first
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    channels = _by_eight(32, width)
    layers: list[nn.Module] = [*_conv_bn(_positive(in_channels, "in_channels"), channels, 3), nn.ReLU6()]
    for expansion, base, blocks, first_stride in stages:
        out = _by_eight(base, width)
        for index in range(blocks):
            layers.append(InvertedResidual(channels, out, expansion, first_stride if index == 0 else 1))
            channels = out
    last = _by_eight(1280, max(1.0, width))
    layers += [*_conv_bn(channels, last, 1), nn.ReLU6()]
    return _initialised(nn.Sequential(*layers, *_head(last, num_classes)))


def supernet(
    num_classes: int = 10,
    in_channels: int = 3,
    layers: int = 3,
    width: float = 1.0,
    widths: Sequence[int] = (16, 32, 64),
) -> nn.Module:
    """A search space of ResNets: every layer is a `nas_gate.Choice` of four operators, all with widths of their own.

    Three stages at 32x32, 16x16 and 8x8 after a 3x3 convolution. The candidates of a layer are residual blocks of two
    convolutions of 3x3, two of 5x5, two depthwise-separable ones of 3x3, and the shortcut alone (the identity, or
    where a stage begins a 1x1 convolution of stride 2). The first candidates alone are ResNet-20 with shortcut B:
    40.81 M MACs, 0.27 M parameters.

    Args:
        num_classes: outputs.
        in_channels: channels of the images.
        layers: layers in each stage.
        width: factor on `widths`, rounded.
        widths: channels of the three stages.
    """
    if len(widths) != 3:
        raise ValueError(f"cifar_supernet: widths must be three, one per stage, but got {list(widths)}")
    _positive(layers, "layers")
    channels = scaled(widths[0], width)
    parts: list[nn.Module] = [*_conv_bn(_positive(in_channels, "in_channels"), channels, 3), nn.ReLU()]
    for stage, base in enumerate(widths):
        out = scaled(base, width)
        for index in range(layers):
            stride = 2 if stage > 0 and index == 0 else 1
            parts.append(Choice([OperatorBlock(channels, out, stride, name) for name in OPERATORS]))
            channels = out
    return _initialised(nn.Sequential(*parts, *_head(channels, num_classes)))


class ResNet(nn.Module):
    """Residual stages of basic blocks after a 3x3 convolution; every stage but the first halves the image.

    Args:
        blocks: basic blocks per stage.
        widths: channels per stage, as many as `blocks`.
        shortcut: "A" or "B", as in `resnet`.
        num_classes: outputs.
        in_channels: channels of the images.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int],
        *,
        shortcut: Shortcut,
        num_classes: int,
        in_channels: int,
    ) -> None:
        super().__init__()
        channels = widths[0]
        self.stem = nn.Sequential(*_conv_bn(_positive(in_channels, "in_channels"), channels, 3), nn.ReLU())
        stages = []
        for stage, (count, width) in enumerate(zip(blocks, widths)):
            layers = []
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                layers.append(BasicBlock(channels, width, stride, shortcut))
                channels = width
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Sequential(*_head(channels, num_classes))
        _initialised(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, num_classes)."""
        logits: Tensor = self.head(self.stages(self.stem(x)))
        return logits


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, added to the shortcut (He et al. 2015, figure 5 left)."""

    def __init__(self, channels: int, out: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_bn(channels, out, 3, stride)
        self.relu1 = nn.ReLU()
        self.conv2, self.bn2 = _conv_bn(out, out, 3)
        self.shortcut = _shortcut(channels, out, stride, shortcut)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) -> (N, out, ceil(H / stride), ceil(W / stride))."""
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu2(y + self.shortcut(x))
        return out


class OperatorBlock(nn.Module):
    """Two convolutions of one of OPERATORS, each with batch norm, added to the shortcut; or the shortcut alone.

    Args:
        channels: channels of the input.
        out: channels of the output.
        stride: pixels per step of the first convolution.
        operator: a key of OPERATORS.
    """

    def __init__(self, channels: int, out: int, stride: int, operator: str) -> None:
        super().__init__()
        make = OPERATORS[operator]
        self.branch = (
            None if make is None else nn.Sequential(*make(channels, out, stride), nn.ReLU(), *make(out, out, 1))
        )
        self.shortcut = _shortcut(channels, out, stride, "B")

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) -> (N, out, ceil(H / stride), ceil(W / stride))."""
        y: Tensor = self.shortcut(x)
        return nn.functional.relu(y if self.branch is None else self.branch(x) + y)


def _separable(channels: int, out: int, stride: int) -> tuple[nn.Module, ...]:
    """3x3 depthwise, then 1x1 (Howard et al.: "MobileNets", 2017, figure 3)."""
    return (*_conv_bn(channels, channels, 3, stride, groups=channels), nn.ReLU(), *_conv_bn(channels, out, 1))


OPERATORS: dict[str, Callable[[int, int, int], tuple[nn.Module, ...]] | None] = {
    "3x3": lambda channels, out, stride: _conv_bn(channels, out, 3, stride),
    "5x5": lambda channels, out, stride: _conv_bn(channels, out, 5, stride),
    "separable": _separable,
    "skip": None,
}
"""What a layer of `supernet` chooses among: (channels, out, stride) -> modules, or nothing."""


class ZeroPadShortcut(nn.Module):
    """Option A of He et al. (2015): every second pixel, and zero channels before and after; no parameters.

    The zeros are buffers, not amounts of a pad, so that they are cut like any other tensor when channels of
    the residual stream are removed: `forward` asks the buffers for their sizes. They stay out of the state
    dict.

    Args:
        channels: channels of the input.
        out: channels of the output, not fewer.
        stride: pixels per step.
    """

    before: Tensor
    after: Tensor

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        if out < channels:
            raise ValueError(
                f"shortcut 'A' pads with zero channels, so no stage may be narrower than the one before, "
                f"but got {out} after {channels} channels; shortcut 'B' can narrow"
            )
        before = (out - channels) // 2
        self.register_buffer("before", torch.zeros(1, before, 1, 1), persistent=False)
        self.register_buffer("after", torch.zeros(1, out - channels - before, 1, 1), persistent=False)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) -> (N, out, ceil(H / stride), ceil(W / stride)), dtype and layout as x."""
        nhwc = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        x = x[:, :, :: self.stride, :: self.stride]
        n, _, h, w = x.shape
        # The cast is for autocast, where x may be narrower than the buffers and cat would widen the result.
        before = self.before.to(x.dtype).expand(n, -1, h, w)
        after = self.after.to(x.dtype).expand(n, -1, h, w)
        y = torch.cat([before, x, after], 1)
        # cat keeps channels_last only if every part is dense and has it; the expanded zeros are not.
        return y.contiguous(memory_format=torch.channels_last) if nhwc else y


class DenseLayer(nn.Module):
    """Batch norm, ReLU, 3x3 convolution; the result is appended to the input (Huang et al., equation 2)."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(*_bn_relu_conv(channels, growth, 3))

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) -> (N, channels + growth, H, W)."""
        return torch.cat([x, self.layer(x)], 1)


class InvertedResidual(nn.Module):
    """1x1 to `expansion` times the channels, 3x3 depthwise, 1x1 linear (Sandler et al. 2018, table 1).

    The input is added where neither the stride nor the number of channels changes.
    """

    def __init__(self, channels: int, out: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = channels * expansion
        expand = [*_conv_bn(channels, hidden, 1), nn.ReLU6()] if expansion > 1 else []
        depthwise = [*_conv_bn(hidden, hidden, 3, stride, groups=hidden), nn.ReLU6()]
        self.layers = nn.Sequential(*expand, *depthwise, *_conv_bn(hidden, out, 1))
        self.residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) -> (N, out, ceil(H / stride), ceil(W / stride))."""
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


def scaled(channels: int, width: float) -> int:
    """`channels * width` rounded, at least 1."""
    if channels < 1:
        raise ValueError(f"the channels of a layer must be at least 1, but got {channels}")
    if not width > 0:
        raise ValueError(f"width must be above 0, but got {width}")
    return max(1, round(channels * width))


def _by_eight(channels: int, width: float) -> int:
    """`channels * width` to the nearest multiple of 8, at least 8 and not below 90% of it."""
    if not width > 0:
        raise ValueError(f"width must be above 0, but got {width}")
    wanted = channels * width
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wanted else rounded


def _positive(value: int, what: str) -> int:
    if value < 1:
        raise ValueError(f"{what} must be at least 1, but got {value}")
    return value


def _conv(channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


def _conv_bn(
    channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    return _conv(channels, out, kernel, stride, groups), nn.BatchNorm2d(out)


def _bn_relu_conv(channels: int, out: int, kernel: int) -> tuple[nn.Module, ...]:
    return nn.BatchNorm2d(channels), nn.ReLU(), _conv(channels, out, kernel)


def _head(channels: int, num_classes: int) -> tuple[nn.Module, ...]:
    classes = _positive(num_classes, "num_classes")
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)


def _shortcut(channels: int, out: int, stride: int, shortcut: Shortcut) -> nn.Module:
    if shortcut not in ("A", "B"):
        raise ValueError(f'shortcut must be "A" or "B", but got {shortcut!r}')
    if stride == 1 and channels == out:
        return nn.Identity()
    if shortcut == "A":
        return ZeroPadShortcut(channels, out, stride)
    return nn.Sequential(*_conv_bn(channels, out, 1, stride))


def _initialised(model: nn.Module) -> nn.Module:
    """He et al. ("Delving Deep into Rectifiers", 2015), equation 14 (by fan out), for convolutions."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
