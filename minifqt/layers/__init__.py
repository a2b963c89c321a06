"""Layers with explicit forward and backward. Read quantized.py first: Conv2d and Linear.

There is no autograd and no branch on quantization; layers know no device.
"""
from minifqt.layers.base import Layer, Param, Places, Quantized, Sequential, build
from minifqt.layers.floating import BatchNorm2d, Flatten, GlobalAvgPool2d, MaxPool2d, ReLU
from minifqt.layers.quantized import Conv2d, Linear

__all__ = ["BatchNorm2d", "Conv2d", "Flatten", "GlobalAvgPool2d", "Layer", "Linear", "MaxPool2d",
           "Param", "Places", "Quantized", "ReLU", "Sequential", "build"]
