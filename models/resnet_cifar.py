"""Pre-activation ResNets for small images: 6n + 2 layers, 16, 32, 64 channels.

Source: arXiv 1603.05027, figure 4 (the order of layers); arXiv 1512.03385, section 4.2 (the sizes).
"""
from functools import partial

from minifqt.layers import BatchNorm2d, Conv2d, GlobalAvgPool2d, Layer, Linear, ReLU, Sequential


class Block(Layer):
    """y = x + conv2(relu(bn2(conv1(relu(bn1(x)))))).  (N, H, W, C) → the same."""

    def __init__(self, channels):
        self.bn1, self.relu1 = BatchNorm2d(channels), ReLU()
        self.conv1 = Conv2d(channels, channels, 3, padding=1)
        self.bn2, self.relu2 = BatchNorm2d(channels), ReLU()
        self.conv2 = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        a = self.relu1.forward(self.bn1.forward(x))
        b = self.relu2.forward(self.bn2.forward(self.conv1.forward(a)))
        return x + self.conv2.forward(b)

    def backward(self, dy):
        db = self.bn2.backward(self.relu2.backward(self.conv2.backward(dy)))
        return dy + self.bn1.backward(self.relu1.backward(self.conv1.backward(db)))


class DownBlock(Layer):
    """As Block at half the size; the shortcut is a 1×1 convolution of the activated input.

    (N, H, W, in_channels) → (N, ⌈H/2⌉, ⌈W/2⌉, channels).
    """

    def __init__(self, in_channels, channels):
        self.bn1, self.relu1 = BatchNorm2d(in_channels), ReLU()
        self.shortcut = Conv2d(in_channels, channels, 1, stride=2)
        self.conv1 = Conv2d(in_channels, channels, 3, stride=2, padding=1)
        self.bn2, self.relu2 = BatchNorm2d(channels), ReLU()
        self.conv2 = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        a = self.relu1.forward(self.bn1.forward(x))
        b = self.relu2.forward(self.bn2.forward(self.conv1.forward(a)))
        return self.shortcut.forward(a) + self.conv2.forward(b)

    def backward(self, dy):
        db = self.bn2.backward(self.relu2.backward(self.conv2.backward(dy)))
        da = self.conv1.backward(db) + self.shortcut.backward(dy)
        return self.bn1.backward(self.relu1.backward(da))


class ResNetCifar(Layer):
    """Three stages of n blocks.  (N, 32, 32, channels) → (N, classes); other sizes work too."""

    def __init__(self, n, classes, channels):
        self.conv1 = Conv2d(channels, 16, 3, padding=1)                       # 32×32×16
        self.layer1 = Sequential(*[Block(16) for _ in range(n)])              # 32×32×16
        self.layer2 = Sequential(DownBlock(16, 32), *[Block(32) for _ in range(n - 1)])  # 16×16×32
        self.layer3 = Sequential(DownBlock(32, 64), *[Block(64) for _ in range(n - 1)])  # 8×8×64
        self.bn, self.relu, self.pool = BatchNorm2d(64), ReLU(), GlobalAvgPool2d()       # 64
        self.fc = Linear(64, classes)

    def forward(self, x):
        x = self.layer3.forward(self.layer2.forward(self.layer1.forward(self.conv1.forward(x))))
        return self.fc.forward(self.pool.forward(self.relu.forward(self.bn.forward(x))))

    def backward(self, dy):
        dx = self.bn.backward(self.relu.backward(self.pool.backward(self.fc.backward(dy))))
        dx = self.layer1.backward(self.layer2.backward(self.layer3.backward(dx)))
        return self.conv1.backward(dx)


MODELS = {f"resnet{6 * n + 2}": partial(ResNetCifar, n) for n in (1, 3, 5, 7, 9, 18)}
