"""Models by name: `build("resnet20", classes=10, recipe="bhq5", seed=0)`."""
from minifqt import Recipe, layers
from models import resnet_cifar, resnet_imagenet

MODELS = {**resnet_cifar.MODELS, **resnet_imagenet.MODELS}


def build(name: str, classes: int = 10, recipe: Recipe | str = "bhq5", seed: int = 0,
          device: str = "cpu", dtype: str = "float32", channels: int = 3) -> layers.Layer:
    """A network ready to train: layers named, weights drawn, four quantizers in each.

    name      resnet8 (small), resnet20/32/44/56/110 (CIFAR), resnet18/34/50 (ImageNet)
    seed      of the weights and of all rounding
    channels  of the input images
    Raises ValueError for an unknown name, recipe, device or dtype.
    """
    if name not in MODELS:
        raise ValueError(f"no model is named {name!r}; there are {', '.join(MODELS)}.")
    if classes < 1 or channels < 1:
        raise ValueError(f"classes {classes}, channels {channels}: expected at least 1 of each.")
    return layers.build(MODELS[name](classes, channels), recipe, seed, device, dtype)
