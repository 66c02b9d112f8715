"""Three small networks with short and long receptive fields, and the repairs of the saturation paper; no timm, no options to read about."""

from torch import nn


def conv(inputs, outputs, kernel=3, stride=1):
    return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def head(width, classes):
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]


class Basic(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        first, second = conv(inputs, outputs, stride=stride), conv(outputs, outputs)
        self.conv1, self.bn1, self.act1 = first
        self.conv2, self.bn2, self.act2 = second
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(*conv(inputs, outputs, 1, stride)[:2])

    def forward(self, x):
        y = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        return self.act2(y + self.shortcut(x))


def short(classes, chans, width=16):
    """Six convolutions, three of them strided: every unit of the last one sees 43 pixels."""
    layers, inputs = [], chans
    for outputs in (width, 2 * width, 4 * width):
        layers += conv(inputs, outputs, stride=2) + conv(outputs, outputs)
        inputs = outputs
    return nn.Sequential(*layers, *head(inputs, classes))


def vgg16(classes, chans, width=8):
    """VGG16's thirteen convolutions at a fraction of the width: 196 pixels."""
    layers, inputs = [], chans
    for repeats, factor in ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8)):
        for _ in range(repeats):
            layers += conv(inputs, width * factor)
            inputs = width * factor
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers[:-1], *head(inputs, classes))


def vgg10(classes, chans, width=8):
    """Ten convolutions in VGG's manner behind a strided stem, four stages: 181 pixels."""
    layers, inputs = conv(chans, width, stride=2) + conv(width, width) + [nn.MaxPool2d(2)], width
    for repeats, factor in ((2, 2), (3, 4), (3, 8)):
        for _ in range(repeats):
            layers += conv(inputs, width * factor)
            inputs = width * factor
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers[:-1], *head(inputs, classes))


def resnet18(classes, chans, width=16, early=True):
    """ResNet18 with its 7x7 stem at a fraction of the width: 139 to 435 pixels; `early` keeps the first two downsamplings."""
    stride = 2 if early else 1
    stem = conv(chans, width, 7, stride) + ([nn.MaxPool2d(3, 2, 1)] if early else [])
    blocks, inputs = [], width
    for stage, outputs in enumerate((width, 2 * width, 4 * width, 8 * width)):
        blocks += [Basic(inputs, outputs, 2 if stage else 1), Basic(outputs, outputs)]
        inputs = outputs
    return nn.Sequential(nn.Sequential(*stem), nn.Sequential(*blocks), *head(inputs, classes))


NETWORKS = {"short": short, "vgg10": vgg10, "vgg16": vgg16, "resnet18": resnet18}
