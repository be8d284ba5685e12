"""A small residual network for scikit-learn's digits (1x8x8 images, grey levels)."""

from torch import nn

from nas_gate.models.cifar import ResNet, scaled


def digits_cnn(num_classes: int = 10, in_channels: int = 1, width: float = 1.0) -> nn.Module:
    """Three residual blocks of 24, 48 and 96 channels at 8x8, 4x4 and 2x2: 1.71 M MACs, 0.17 M parameters.

    Args:
        num_classes: outputs; the model maps (N, in_channels, 8, 8) to (N, num_classes).
        in_channels: channels of the images.
        width: factor on the three widths.
    """
    widths = [scaled(channels, width) for channels in (24, 48, 96)]
    return ResNet((1, 1, 1), widths, shortcut="B", num_classes=num_classes, in_channels=in_channels)
