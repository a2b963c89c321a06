"""ResNet-18/34/50 v1.5 for ImageNet (the stride on the 3×3 convolution), with torchvision's parameter names.

Source: arXiv 1512.03385, table 1; names and v1.5 as in torchvision.models.resnet. Weights move in with one permutation,
(K, C, R, S) → (K, R, S, C).
"""
from functools import partial

from minifqt.layers import BatchNorm2d, Conv2d, GlobalAvgPool2d, Layer, Linear, MaxPool2d, ReLU, Sequential


class Residual(Layer):
    """y = relu(branch(x) + shortcut(x)); a subclass makes the branch's layers and says their order in `branch`."""

    def __init__(self, in_channels, channels, stride):
        self.relu = ReLU()
        self.shortcut = None
        if stride != 1 or in_channels != channels:
            self.downsample = Sequential(Conv2d(in_channels, channels, 1, stride=stride), BatchNorm2d(channels))
            self.shortcut = self.downsample

    def children(self):
        return ((name, layer) for name, layer in super().children() if name != "shortcut")

    def branch(self):
        raise TypeError(f"{type(self).__name__} defines no branch.")

    def forward(self, x):
        y = x
        for layer in self.branch():
            y = layer.forward(y)
        return self.relu.forward(y + (self.shortcut.forward(x) if self.shortcut else x))

    def backward(self, dy):
        dsum = self.relu.backward(dy)
        dx = dsum
        for layer in reversed(self.branch()):
            dx = layer.backward(dx)
        return dx + (self.shortcut.backward(dsum) if self.shortcut else dsum)


class BasicBlock(Residual):
    """Two 3×3 convolutions, the first with the stride."""

    expansion = 1

    def __init__(self, in_channels, width, stride):
        self.conv1, self.bn1 = Conv2d(in_channels, width, 3, stride=stride, padding=1), BatchNorm2d(width)
        self.relu1 = ReLU()
        self.conv2, self.bn2 = Conv2d(width, width, 3, padding=1), BatchNorm2d(width)
        super().__init__(in_channels, width, stride)

    def branch(self):
        return self.conv1, self.bn1, self.relu1, self.conv2, self.bn2


class Bottleneck(Residual):
    """1×1, 3×3 with the stride, 1×1 to four times the width."""

    expansion = 4

    def __init__(self, in_channels, width, stride):
        self.conv1, self.bn1, self.relu1 = Conv2d(in_channels, width, 1), BatchNorm2d(width), ReLU()
        self.conv2, self.bn2 = Conv2d(width, width, 3, stride=stride, padding=1), BatchNorm2d(width)
        self.relu2 = ReLU()
        self.conv3, self.bn3 = Conv2d(width, 4 * width, 1), BatchNorm2d(4 * width)
        super().__init__(in_channels, 4 * width, stride)

    def branch(self):
        return self.conv1, self.bn1, self.relu1, self.conv2, self.bn2, self.relu2, self.conv3, self.bn3


class ResNet(Layer):
    """Stem, four stages, classifier.  (N, 224, 224, channels) → (N, classes); any size that survives five halvings."""

    def __init__(self, block, depths, classes, channels):
        self.conv1, self.bn1 = Conv2d(channels, 64, 7, stride=2, padding=3), BatchNorm2d(64)   # 112×112×64
        self.relu, self.maxpool = ReLU(), MaxPool2d(3, stride=2, padding=1)                    # 56×56×64
        self.layer1 = stage(block, 64, 64, depths[0], 1)                                       # 56×56
        self.layer2 = stage(block, 64 * block.expansion, 128, depths[1], 2)                    # 28×28
        self.layer3 = stage(block, 128 * block.expansion, 256, depths[2], 2)                   # 14×14
        self.layer4 = stage(block, 256 * block.expansion, 512, depths[3], 2)                   # 7×7
        self.avgpool, self.fc = GlobalAvgPool2d(), Linear(512 * block.expansion, classes)

    def forward(self, x):
        for _, layer in self.children():
            x = layer.forward(x)
        return x

    def backward(self, dy):
        for _, layer in reversed(list(self.children())):
            dy = layer.backward(dy)
        return dy


def stage(block, in_channels, width, depth, stride):
    first = block(in_channels, width, stride)
    return Sequential(first, *[block(width * block.expansion, width, 1) for _ in range(depth - 1)])


MODELS = {"resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2)), "resnet34": partial(ResNet, BasicBlock, (3, 4, 6, 3)),
          "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3))}
