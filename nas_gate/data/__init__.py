"""Data by name: `load("digits")` gives train, validation and test loaders on one interface.

The validation part is held out of the training part by a seeded, stratified split; the test part is never
touched by it. Sets that fit in memory are tensors, augmented in batches on the device; large ones stream.
"""

from nas_gate.data.augment import Augment, StreamAugment, crop, cutout, flip
from nas_gate.data.catalog import NAMES, Data, load
from nas_gate.data.loaders import Loader, StreamLoader, TensorLoader
from nas_gate.data.schedule import Schedule, stratified_split

__all__ = [
    "NAMES",
    "Augment",
    "Data",
    "Loader",
    "Schedule",
    "StreamAugment",
    "StreamLoader",
    "TensorLoader",
    "crop",
    "cutout",
    "flip",
    "load",
    "stratified_split",
]
