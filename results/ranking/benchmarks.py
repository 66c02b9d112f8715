"""The benchmark spaces of the ranking study: rows of published tables and the networks that they name, in plain torch.

NAS-Bench-201 is the product's own space at the published size. NAS-Bench-101 (Ying et al., 2019) and NAS-Bench-Macro (Su et al., 2021)
are built here from their papers' descriptions and checked against the published parameter counts by `check`.
"""

import gzip
import io
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from capnas.search_spaces import nasbench201
from torch import nn

from capnas._timm import import_timm
from capnas.candidates import build_model
from capnas.spaces import load_space

SPACES = ("nasbench201", "nasbench101", "macro", "timm", "mbconv", "mobilenetv2")


def cifar(path, count, seed, size=32, raw=False):
    """`count` CIFAR-10 training images from the archive of JPEG files, (count, 3, size, size), with their classes.

    Normalized floats, or with `raw` bytes (count, size, size, 3) and classes as NumPy arrays.
    """
    from PIL import Image

    with zipfile.ZipFile(path) as archive:
        names = sorted(n for n in archive.namelist() if n.startswith("train/") and n.endswith(".jpg"))
        classes = sorted({n.split("/")[1] for n in names})
        chosen = [names[i] for i in np.random.default_rng(seed).choice(len(names), count, replace=False)]
        images = [Image.open(io.BytesIO(archive.read(n))).convert("RGB") for n in chosen]
    if size != 32:
        images = [image.resize((size, size), Image.BILINEAR) for image in images]
    targets = np.array([classes.index(n.split("/")[1]) for n in chosen])
    if raw:
        return np.stack([np.asarray(image) for image in images]), targets
    x = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.247, 0.243, 0.261])
    return (x - mean[:, None, None]) / std[:, None, None], torch.from_numpy(targets)


def table(space, folder, count=None, seed=0, without=()):
    """Rows of a benchmark without some: at most `count`, drawn by isomorphism class where the table names one; arch, accuracy and more."""
    folder = Path(folder)
    if space == "nasbench201":
        rows = pd.read_csv(folder / "nasbench201_cifar10_dev.csv.gz").drop_duplicates("unique")
        rows = rows.rename(columns={"c10_200": "accuracy", "c10_12": "short_accuracy"})
    elif space == "nasbench101":
        with gzip.open(folder / "nasbench101_learning_curves_dev.csv.gz", "rt") as file:
            rows = pd.read_csv(file, dtype={"ops": str})
        rows["ops"] = rows["ops"].fillna("")
        rows["arch"] = [f"{n}:{adj}:{ops}" for n, adj, ops in zip(rows["n"], rows["adj"], rows["ops"])]
        rows = rows.drop_duplicates("arch").rename(columns={"test_acc": "accuracy"})
        rows["short_accuracy"] = rows["val_12"]
    elif space == "macro":
        rows = pd.read_csv(folder / "nasbench_macro_cifar10_dev.csv.gz", dtype={"arch": str}).rename(columns={"mean_acc": "accuracy"})
    elif space == "timm":
        rows = pd.read_csv(folder / "timm_imagenet_dev.csv")
        rows = rows[rows["in_timm"]].rename(columns={"arch": "network", "model": "arch", "top1": "accuracy", "params_M": "params"})
        rows["params"] *= 1e6
        rows = rows.sort_values("gmacs", kind="stable")  # cheapest first
    elif space == "mbconv":
        rows = pd.read_json(Path(__file__).parent / "raw" / "mbconv-trained.jsonl", lines=True)
        rows = rows[rows["status"] == "complete"]
    elif space == "mobilenetv2":
        rows = pd.read_csv(folder / "mobilenet_v2_width_x_resolution.csv").rename(columns={"top1": "accuracy", "resolution": "img_size"})
        rows["arch"] = [f"mobilenetv2-{width:g}" for width in rows["width"]]
        rows["macs"], rows["params"] = 1e6 * rows["macs_M"], 1e6 * rows["params_M"]
    else:
        raise ValueError(f"space is one of {', '.join(SPACES)}; got {space!r}.")
    rows = rows[~rows["arch"].isin(without)]
    if count is not None and count < len(rows):
        rows = rows.sample(count, random_state=seed)
    return rows.reset_index(drop=True)


def build(space, row, width=None):
    """The network of a row at torch's default initialization. `width`: channels of the first stage where not the published number."""
    if space == "nasbench201":
        operations = {(int(k[3]), int(k[5])): v for k, v in nasbench201.parameters(row["arch"]).items()}
        return nasbench201.CellNet(operations, cells=5, channels=width or 16)
    if space == "nasbench101":
        return Bench101(row["n"], row["adj"], row["ops"], width or 64)
    if space == "macro":
        return Macro(row["arch"], width or 32)
    if space == "mbconv":
        return build_model(load_space("mbconv"), row["params_drawn"], num_classes=10, in_chans=3, image_size=int(row["image_size"]), seed=0)
    timm = import_timm()
    if space == "mobilenetv2":
        return timm.models.efficientnet._gen_mobilenet_v2("mobilenetv2_100", channel_multiplier=row["width"])
    fixed = {} if not getattr(timm.get_pretrained_cfg(row["network"]), "fixed_input_size", False) else {"img_size": width or 224}
    return timm.create_model(row["network"], num_classes=1000, **fixed)


def conv(width, out_width, kernel, stride=1, groups=1, act=True):
    layers = [nn.Conv2d(width, out_width, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(out_width)]
    return nn.Sequential(*layers, *([nn.ReLU(inplace=True)] if act else []))


class Graph(nn.Module):
    """A cell of NAS-Bench-101: vertices 1x1, 3x3 (conv, norm, ReLU) or 3x3 max pool; sums at the inputs, concatenation at the output."""

    def __init__(self, n, adj, ops, width, out_width):
        super().__init__()
        pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
        edges = [pair for k, pair in enumerate(pairs) if int(adj) >> k & 1]
        self.n, self.edges = int(n), edges
        inner = [i for i in range(1, n - 1) if (i, n - 1) in edges]
        self.read = inner
        self.widths = self._widths(edges, n, width, out_width, inner)
        self.project, self.op = nn.ModuleDict(), nn.ModuleDict()
        for i in range(1, n - 1):
            if (0, i) in edges:
                self.project[str(i)] = conv(width, self.widths[i], 1)
            self.op[str(i)] = {"C": lambda w: conv(w, w, 3), "1": lambda w: conv(w, w, 1),
                               "P": lambda w: nn.MaxPool2d(3, 1, 1)}[ops[i - 1]](self.widths[i])  # fmt: skip
        if (0, n - 1) in edges:
            self.project[str(n - 1)] = conv(width, out_width, 1)

    @staticmethod
    def _widths(edges, n, width, out_width, inner):
        """The output's channels shared among the vertices that it concatenates; a vertex is as wide as the widest that it feeds."""
        widths = [0] * n
        widths[0], widths[n - 1] = width, out_width
        if n == 2:
            return widths
        share, rest = divmod(out_width, max(1, len(inner)))
        for position, i in enumerate(inner):
            widths[i] = share + (position < rest)
        for i in range(n - 2, 0, -1):
            if i not in inner:
                widths[i] = max((widths[j] for j in range(i + 1, n - 1) if (i, j) in edges), default=0)
        return widths

    def forward(self, x):
        values = {0: x}
        for i in range(1, self.n - 1):
            terms = [values[j][:, : self.widths[i]] for j in range(1, i) if (j, i) in self.edges]
            if (0, i) in self.edges:
                terms.append(self.project[str(i)](x))
            values[i] = self.op[str(i)](sum(terms))
        last = str(self.n - 1)
        if not self.read:
            return self.project[last](x)
        out = torch.cat([values[i] for i in self.read], 1) if len(self.read) > 1 else values[self.read[0]]
        return out + self.project[last](x) if last in self.project else out


class Bench101(nn.Module):
    """Stem, three stacks of three cells with a max pool and twice the width between them, average pool, linear layer."""

    def __init__(self, n, adj, ops, width=128, classes=10):
        super().__init__()
        self.stem = conv(3, width, 3)
        cells, now = [], width
        for stack in range(3):
            for position in range(3):
                out = width * 2**stack
                halve = [nn.MaxPool2d(2, 2)] if stack and not position else []
                cells.append(nn.Sequential(*halve, Graph(n, adj, ops, now, out)))
                now = out
        self.cells, self.fc = nn.Sequential(*cells), nn.Linear(now, classes)

    def forward(self, x):
        return self.fc(self.cells(self.stem(x)).mean((2, 3)))


class Inverted(nn.Module):
    """Inverted residual: expand, depthwise, project, with a shortcut where shapes agree."""

    def __init__(self, width, out_width, stride, expansion, kernel):
        super().__init__()
        inner = width * expansion
        self.body = nn.Sequential(conv(width, inner, 1), conv(inner, inner, kernel, stride, inner), conv(inner, out_width, 1, act=False))
        self.shortcut = stride == 1 and width == out_width

    def forward(self, x):
        return x + self.body(x) if self.shortcut else self.body(x)


class Macro(nn.Module):
    """NAS-Bench-Macro: stages of 2, 3 and 3 positions, the first of each halving the map and doubling the width."""

    def __init__(self, arch, width=32, classes=10):
        super().__init__()
        self.stem, blocks = conv(3, width, 3), []
        for position, choice in enumerate(arch):
            first = position in (0, 2, 5)
            out, stride = (2 * width, 2) if first else (width, 1)
            if choice == "0":
                blocks.append(conv(width, out, 1, 2, act=False) if first else nn.Identity())
            else:
                blocks.append(Inverted(width, out, stride, *((3, 3) if choice == "1" else (6, 5))))
            width = out
        self.blocks, self.out, self.fc = nn.Sequential(*blocks), conv(width, 1280, 1), nn.Linear(1280, classes)

    def forward(self, x):
        return self.fc(self.out(self.blocks(self.stem(x))).mean((2, 3)))


def check(folder, count=40):
    """Published parameters against ours, per space: the largest relative difference."""
    found = {}
    for space, width in (("nasbench201", 16), ("nasbench101", 128), ("macro", 32), ("mobilenetv2", None)):
        rows = table(space, folder, count)
        with torch.device("meta"):
            ours = [sum(p.numel() for p in build(space, row, width).parameters()) for _, row in rows.iterrows()]
        found[space] = float(np.max(np.abs(np.array(ours) / rows["params"].to_numpy() - 1)))
    return found
