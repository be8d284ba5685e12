"""Models by name: the CIFAR networks of the literature, torchvision's classifiers, your own factories.

`build(name, **arguments)` makes a model, `names()` lists the names, `accepts(name, keyword)` asks what a
builder takes, `without_weights(name, arguments)` describes the same architecture without pretrained weights,
`natural_input(name, arguments)` is the size of image that a model was made for, `load_weights(model, path)` fills a
model with trained weights.
"""

from nas_gate.models.registry import accepts, build, names, natural_input, without_weights
from nas_gate.models.weights import load_weights

__all__ = ["accepts", "build", "load_weights", "names", "natural_input", "without_weights"]
