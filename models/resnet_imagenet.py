"""ResNet-18/34/50 v1.5 for ImageNet, with the parameter names of torchvision.models.resnet.

v1.5 has the stride on the 3×3 convolution. Weights move in and out with one permutation,
(K, C, R, S) ↔ (K, R, S, C). Source: arXiv 1512.03385, table 1.
"""
from functools import partial

from minifqt.layers import (
    BatchNorm2d,
    Conv2d,
    GlobalAvgPool2d,
    Layer,
    Linear,
    MaxPool2d,
    ReLU,
    Sequential,
)


class Block(Layer):
    """y = relu(branch(x) + shortcut(x)); a subclass makes the branch and says its order."""

    def __init__(self, in_channels, channels, stride):
        self.relu = ReLU()
        if stride != 1 or in_channels != channels:
            shortcut = Conv2d(in_channels, channels, 1, stride=stride)
            self.downsample = Sequential(shortcut, BatchNorm2d(channels))
        else:
            self.downsample = Sequential()                # nothing to do: x itself

    def forward(self, x):
        y = x
        for layer in self.branch():
            y = layer.forward(y)
        return self.relu.forward(y + self.downsample.forward(x))

    def backward(self, dy):
        dsum = self.relu.backward(dy)
        dx = dsum
        for layer in reversed(self.branch()):
            dx = layer.backward(dx)
        return dx + self.downsample.backward(dsum)


class BasicBlock(Block):
    """Two 3×3 convolutions, the first with the stride."""

    expansion = 1

    def __init__(self, in_channels, width, stride):
        self.conv1 = Conv2d(in_channels, width, 3, stride=stride, padding=1)
        self.bn1, self.relu1 = BatchNorm2d(width), ReLU()
        self.conv2 = Conv2d(width, width, 3, padding=1)
        self.bn2 = BatchNorm2d(width)
        super().__init__(in_channels, width, stride)

    def branch(self):
        return self.conv1, self.bn1, self.relu1, self.conv2, self.bn2


class Bottleneck(Block):
    """1×1, 3×3 with the stride, 1×1 to four times the width."""

    expansion = 4

    def __init__(self, in_channels, width, stride):
        self.conv1 = Conv2d(in_channels, width, 1)
        self.bn1, self.relu1 = BatchNorm2d(width), ReLU()
        self.conv2 = Conv2d(width, width, 3, stride=stride, padding=1)
        self.bn2, self.relu2 = BatchNorm2d(width), ReLU()
        self.conv3 = Conv2d(width, 4 * width, 1)
        self.bn3 = BatchNorm2d(4 * width)
        super().__init__(in_channels, 4 * width, stride)

    def branch(self):
        return (self.conv1, self.bn1, self.relu1, self.conv2, self.bn2, self.relu2,
                self.conv3, self.bn3)


class ResNet(Layer):
    """Stem, four stages, classifier.  (N, 224, 224, channels) → (N, classes); other sizes too."""

    def __init__(self, block, depths, classes, channels):
        wide = block.expansion
        self.conv1 = Conv2d(channels, 64, 7, stride=2, padding=3)             # 112×112×64
        self.bn1, self.relu = BatchNorm2d(64), ReLU()
        self.maxpool = MaxPool2d(3, stride=2, padding=1)                      # 56×56×64
        self.layer1 = stage(block, 64, 64, depths[0], stride=1)               # 56×56
        self.layer2 = stage(block, 64 * wide, 128, depths[1], stride=2)       # 28×28
        self.layer3 = stage(block, 128 * wide, 256, depths[2], stride=2)      # 14×14
        self.layer4 = stage(block, 256 * wide, 512, depths[3], stride=2)      # 7×7
        self.avgpool = GlobalAvgPool2d()
        self.fc = Linear(512 * wide, classes)

    def forward(self, x):
        for _, layer in self.children():                  # one after another, as listed above
            x = layer.forward(x)
        return x

    def backward(self, dy):
        for _, layer in reversed(list(self.children())):
            dy = layer.backward(dy)
        return dy


def stage(block, in_channels, width, depth, stride):
    """`depth` blocks, the first with the stride."""
    rest = [block(width * block.expansion, width, 1) for _ in range(depth - 1)]
    return Sequential(block(in_channels, width, stride), *rest)


MODELS = {
    "resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2)),
    "resnet34": partial(ResNet, BasicBlock, (3, 4, 6, 3)),
    "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3)),
}
