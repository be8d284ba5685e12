"""A small fully convolutional network for the drawn shapes (3x32x32 pictures, a class per pixel)."""

from torch import nn

from nas_gate.models.cifar import scaled


def shapes_fcn(num_classes: int = 4, in_channels: int = 3, width: float = 1.0) -> nn.Module:
    """Five 3x3 convolutions with two strides of 2, a classifier per place, bilinear interpolation by 4: 7.54 M MACs.

    After Long, Shelhamer, Darrell: "Fully Convolutional Networks for Semantic Segmentation" (2015).

    Args:
        num_classes: the model maps (N, in_channels, H, W), multiples of 4, to (N, num_classes, H, W).
        in_channels: channels of the pictures.
        width: factor on the widths 16, 32, 32, 64, 64.
    """
    layers: list[nn.Module] = []
    before = in_channels
    for channels, stride in ((16, 1), (32, 2), (32, 1), (64, 2), (64, 1)):
        out = scaled(channels, width)
        layers += [nn.Conv2d(before, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        before = out
    return nn.Sequential(*layers, nn.Conv2d(before, num_classes, 1), nn.Upsample(scale_factor=4, mode="bilinear"))
