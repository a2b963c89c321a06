"""minifqt: fully quantized training, to see and to run.

Read training.train_step, layers.Conv2d, quantizers/psq.py, kernels/reference.py, in this order.
"""
from minifqt import layers, quantizers
from minifqt.backend import set_threads
from minifqt.fusion import fuse
from minifqt.losses import cross_entropy
from minifqt.optim import SGD
from minifqt.qtensor import QTensor
from minifqt.recipes import Recipe, recipe
from minifqt.rng import NonFiniteError, Streams
from minifqt.training import evaluate, train_step

__version__ = "0.1.0"
__all__ = ["NonFiniteError", "QTensor", "Recipe", "SGD", "Streams", "cross_entropy", "evaluate",
           "fuse", "layers", "quantizers", "recipe", "set_threads", "train_step"]
