"""Make ``fashion-mnist-12k.npz``, the data set that comes with capnas, from the full Fashion-MNIST.

10,000 training images (1,000 a class, drawn from the official 60,000) and 2,000 test images (200 a class, drawn from the official
10,000 test images), 28 x 28 grey, in the order of the source files. The draw is seeded, the archive carries no dates: the same
files give the same bytes
(with the reference zlib; another deflate library may pack the same arrays differently, so ``--check`` compares both).

    python make_fashion_mnist_12k.py [FOLDER] [--out FILE] [--check]

FOLDER holds the four idx files, gzip or plain; by default those of Debian's package ``dataset-fashion-mnist``.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
HERE = Path(__file__).resolve().parent
SEED = 12_000
PER_CLASS = {"train": 1000, "t10k": 200}


def read_idx(folder: Path, stem: str) -> np.ndarray:
    """The array of one idx file (its header: two zero bytes, type 8 = uint8, dimensions, one big-endian size each)."""
    packed = folder / f"{stem}.gz"
    raw = gzip.decompress(packed.read_bytes()) if packed.exists() else (folder / stem).read_bytes()
    shape = tuple(int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3]))
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def select(labels: np.ndarray, per_class: int, rng: np.random.Generator) -> np.ndarray:
    """Sorted positions of ``per_class`` images of each class."""
    return np.sort(np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:per_class] for c in range(10)]))


def make(folder: Path, out: Path) -> None:
    """Write the archive."""
    rng = np.random.default_rng(SEED)
    arrays: dict[str, np.ndarray] = {}
    for part, per_class in PER_CLASS.items():
        images, labels = read_idx(folder, f"{part}-images-idx3-ubyte"), read_idx(folder, f"{part}-labels-idx1-ubyte")
        keep = select(labels, per_class, rng)
        name = "train" if part == "train" else "test"
        arrays |= {f"{name}_images": images[keep], f"{name}_labels": labels[keep], f"{name}_positions": keep.astype(np.uint16)}
    np.savez_compressed(out, **arrays)  # type: ignore[arg-type]


def main() -> None:
    """Parse the command line, write or check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", nargs="?", type=Path, default=DEBIAN)
    parser.add_argument("--out", type=Path, default=HERE / "fashion-mnist-12k.npz")
    parser.add_argument("--check", action="store_true", help="compare with the archive beside this script, write nothing there")
    args = parser.parse_args()
    if not args.check:
        make(args.folder, args.out)
        print(f"{args.out.name}: {args.out.stat().st_size} bytes")
        return
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch) / "fresh.npz"
        make(args.folder, fresh)
        with np.load(fresh) as new, np.load(args.out) as old:
            same_arrays = set(new) == set(old) and all(np.array_equal(new[k], old[k]) for k in new)
        same_bytes = fresh.read_bytes() == args.out.read_bytes()
    print(f"same arrays: {same_arrays}; same bytes: {same_bytes}")
    raise SystemExit(0 if same_arrays else 1)


if __name__ == "__main__":
    main()
