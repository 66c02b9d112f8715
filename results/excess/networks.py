"""The two networks of the study, without norm layers and biases: four weight layers in a row, and two residual blocks."""

from torch import nn


def conv(inputs, outputs, stride=1):
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


def head(features, num_classes):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, num_classes, bias=False))


def plain(num_classes, in_chans, image_size):
    layers = [conv(in_chans, 16), nn.ReLU(), conv(16, 24, 2), nn.ReLU(), conv(24, 40, 2), nn.ReLU()]
    return nn.Sequential(*layers, head(40, num_classes))


class Residual(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.first, self.second, self.relu = conv(inputs, outputs, 2), conv(outputs, outputs), nn.ReLU()
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=2, bias=False)

    def forward(self, x):
        return self.relu(self.shortcut(x) + self.second(self.relu(self.first(x))))


def residual(num_classes, in_chans, image_size):
    return nn.Sequential(conv(in_chans, 16), nn.ReLU(), Residual(16, 24), Residual(24, 40), head(40, num_classes))
