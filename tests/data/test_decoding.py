"""Single images, readers and loaders by themselves: what comes out of odd ones, and in which order."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from capnas._timm import import_timm
from capnas.data.batching import NOT_STREAMED, InMemory, Items, Request, Streamed, as_pil, private_randomness
from capnas.data.decoding import cores, decode, fit, grey_or_rgb, join, shape_of, survey
from capnas.data.images import Augment
from capnas.data.sources import DatasetReader, FileReader, Pair, StreamReader, class_names, from_python
from capnas.errors import DataError, listed


class Listed(torch.utils.data.Dataset):
    """Images of a list, all of one class; remembers the threads that read it."""

    def __init__(self, *images: Any) -> None:
        self.images, self.threads = images, set[int]()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        self.threads.add(threading.get_ident())
        return self.images[index], 0


def square(side: int, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (side, side))


@pytest.mark.parametrize("value", [0, 200, 255, 257, 4000, 40000, 65535])
def test_images_of_16_bits_have_one_scale_dark_and_bright(value: int) -> None:
    image = Image.fromarray(np.full((2, 2), value, np.uint16))
    assert np.asarray(grey_or_rgb(image, 1)).tolist() == [[value >> 8] * 2] * 2
    pixels = fit(image, 2, 1)
    read = pixels.float() / (1 if pixels.is_floating_point() else 255)
    torch.testing.assert_close(read, torch.full((1, 2, 2), value / 65535))
    assert fit(image, 2, 3, deep=False).tolist() == [[[value >> 8] * 2] * 2] * 3


def test_a_large_jpeg_is_not_coarser_for_being_decoded_small(tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 60).resize((512, 512), Image.Resampling.BILINEAR).convert("RGB").save(tmp_path / "x.jpg", quality=95)
    with Image.open(tmp_path / "x.jpg") as image:
        whole = fit(image.copy(), 64, 3)
    quick = fit(Image.open(tmp_path / "x.jpg"), 64, 3)
    assert float((quick.float() - whole.float()).abs().mean()) < 0.1 * float(whole.float().std())


def test_a_picture_has_one_channel_or_three() -> None:
    with pytest.raises(DataError, match="channels"):
        fit(square(4), 4, 2)


def test_native_shapes() -> None:
    assert shape_of(Pair(images=torch.zeros(2, 3, 8, 12), labels=torch.zeros(2))) == (3, 8)
    assert shape_of(DatasetReader(Listed(square(10), square(10), square(40)))) == (3, 10)
    for mode, have in (("1", 1), ("L", 1), ("LA", 1), ("I;16", 1), ("P", 3)):
        assert shape_of(DatasetReader(Listed(square(9, mode)))) == (have, 9), mode


def test_a_dataset_that_may_not_be_shared_is_read_by_the_thread_that_asks() -> None:
    dataset = Listed(*(square(8) for _ in range(6)))
    decode(DatasetReader(dataset), 8, 3, workers=2)
    survey(DatasetReader(dataset), 8, 3, workers=2)
    assert dataset.threads == {threading.get_ident()}


class Stream(torch.utils.data.IterableDataset):
    """The second of three items is no image."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        return iter([(square(8), 0), ("no image", 0), (square(8), 0)])


def test_an_unreadable_item_of_a_stream_is_named_by_its_place() -> None:
    (name,) = decode(StreamReader(Stream()), 8, 3).unreadable
    assert name.startswith("an image of the stream, counted as number 1 (")


def files(folder: Path, count: int) -> FileReader:
    paths = [folder / f"{i}.png" for i in range(count)]
    for path in paths:
        Image.effect_noise((32, 32), 50).save(path)
    return FileReader(paths, [0] * count, folder)


def test_a_survey_counts_damage_apart_from_files_that_do_not_open(tmp_path: Path) -> None:
    part = files(tmp_path, 6)
    part.paths[1].write_bytes(b"no image at all")
    part.paths[4].write_bytes(part.paths[4].read_bytes()[:200])  # it opens and cannot be decoded
    found = survey(part, 8, 1, workers=1)
    assert (found.damaged, sorted(found.unreadable), found.sample.tolist()) == (1, [1, 4], [0, 2, 3, 5])


def test_a_survey_draws_its_sample_by_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capnas.data.decoding._SURVEY", 4)
    part = files(tmp_path, 12)
    samples = [survey(part, 8, 1, seed=seed, workers=1).sample.tolist() for seed in (0, 1, 0)]
    assert samples[0] == samples[2] != samples[1]
    assert all(sample == sorted(sample) and len(sample) == 4 for sample in samples)


def test_bytes_beside_floats_become_floats_up_to_one() -> None:
    assert join([torch.full((1, 1, 2, 2), 255, dtype=torch.uint8), torch.ones(1, 1, 2, 2)]).tolist() == torch.ones(2, 1, 2, 2).tolist()


def test_more_than_eight_cores_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capnas.data.decoding.usable_cpus", lambda: 64)
    assert cores() == 8


def test_images_of_their_own_size_are_not_copied() -> None:
    pool = InMemory(images=torch.zeros(2, 1, 8, 8, dtype=torch.uint8), labels=torch.zeros(2), memory_limit=0)
    assert pool.at(8) is pool.images
    assert not pool.resized


class Gaps:
    """Positions of which some cannot be read; an image is its position."""

    nearest = Streamed.nearest

    def __init__(self, *broken: int, count: int) -> None:
        self.broken, self.labels = broken, torch.arange(count) * 10

    def open(self, position: int) -> int:
        if position in self.broken:
            raise OSError(position)
        return position


def items(source: Gaps) -> Items:
    found = Items(source, torch.arange(len(source.labels)))  # type: ignore[arg-type]
    found.transform = lambda image: image
    return found


def test_an_unreadable_image_is_replaced_by_the_next_one_with_its_class() -> None:
    found = items(Gaps(1, 2, 4, count=5))
    assert [found[i] for i in range(5)] == [(0, 0), (3, 30), (3, 30), (3, 30), (0, 0)]  # behind the last comes the first
    many = items(Gaps(*range(100), count=101))
    assert many[1] == (100, 1000)
    with pytest.raises(DataError, match="100 images in a row"):
        many[0]


def test_arrays_of_bytes_as_pictures() -> None:
    x = np.arange(5 * 6 * 3, dtype=np.uint8).reshape(5, 6, 3)
    assert np.array_equal(np.asarray(as_pil(x)), x)
    for odd in (np.zeros((5, 6, 4), np.uint8), np.full((5, 6, 3), 0.3)):
        with pytest.raises(DataError, match=NOT_STREAMED[:40]):
            as_pil(odd)


class Drawing:
    """Batches that draw from the three global generators, at their start too."""

    def __iter__(self) -> Iterator[tuple[float, float, float]]:
        draws = [(float(torch.rand(())), random.random(), float(np.random.rand())) for _ in range(3)]
        yield draws[0]
        for _ in range(2):
            yield float(torch.rand(())), random.random(), float(np.random.rand())


class Begun:
    """Draws when it is asked for its iterator."""

    def __iter__(self) -> Iterator[float]:
        return iter([float(torch.rand(()))])


def test_a_loader_draws_from_generators_of_its_own() -> None:
    state = torch.get_rng_state()
    (first,) = private_randomness(Begun(), 3)
    assert first == float(torch.rand((), generator=torch.Generator().manual_seed(3)))
    assert torch.equal(torch.get_rng_state(), state)
    runs = [list(private_randomness(Drawing(), seed)) for seed in (0, 1)]
    for numbers in zip(*runs[0], strict=True):
        assert len(set(numbers)) == 3  # it goes on from batch to batch
    for one, other in zip(*runs, strict=True):
        assert not set(one) & set(other)  # each of the three follows from the seed


@pytest.mark.parametrize(("augment", "scale", "hflip"), [(Augment(flip=True), (5 / 6) ** 2, 0.5), (Augment(flip=False), (5 / 6) ** 2, 0.0)])
def test_timms_loader_crops_as_much_as_a_shift_does(augment: Augment, scale: float, hflip: float, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(import_timm("timm.data"), "create_loader", lambda *_, **given: asked.update(given) or [])
    monkeypatch.setattr(Augment, "pixels", lambda self, size: size // 6)
    pool = Streamed(readers=(DatasetReader(Listed(square(12))),), labels=torch.zeros(1), in_chans=3, workers=2)
    request = Request(
        positions=torch.arange(1), batch_size=1, training=True, augment=augment, seed=0, device=torch.device("cpu"), size=12,
        mean=(0.0,) * 3, std=(1.0,) * 3,
    )  # fmt: skip
    assert list(pool.batches(request)) == []
    assert asked["scale"] == (pytest.approx(scale), 1.0)
    assert (asked["hflip"], asked["num_workers"]) == (hflip, 2)


def test_a_split_is_given_once() -> None:
    pair = (np.zeros((2, 4, 4)), [0, 1])
    with pytest.raises(DataError, match="at most one 'val' and one 'test', found train, val, valid"):
        from_python({"train": pair, "val": pair, "valid": pair})
    with pytest.raises(DataError, match="a pair"):
        from_python((*pair, [0, 1]))


def test_positions_go_on_from_part_to_part() -> None:
    parts = tuple(DatasetReader(Listed(*(square(8 + i) for i in sides))) for sides in ((0, 1), (2,)))
    pool = Streamed(readers=parts, labels=torch.zeros(3), in_chans=3, workers=0)
    assert [pool.open(i).size for i in range(3)] == [(8, 8), (9, 9), (10, 10)]


def test_items_may_hold_more_than_an_image_and_its_class() -> None:
    rows = [{"img": square(4), "image": square(8), "label": 3}, (square(9), 5, "from a camera")]
    reader = DatasetReader(Listed())
    for row, (side, label) in zip(rows, ((8, 3), (9, 5)), strict=True):
        reader.dataset = [row]
        image, found = reader.read(0)
        assert (image.size, found) == ((side, side), label)


def test_names_of_classes_are_in_the_order_of_their_numbers() -> None:
    def named(mapping: dict[str, int]) -> tuple[str, ...] | None:
        return class_names(SimpleNamespace(reader=SimpleNamespace(class_to_idx=mapping, filename=str)))

    assert named({"b": 0, "a": 1}) == ("b", "a")
    assert named({"a": 0, "b": 2}) is None
    assert class_names(SimpleNamespace(classes=("x", 1))) == ("x", "1")
    assert class_names(SimpleNamespace(classes="ab")) is None


@pytest.mark.parametrize("attribute", ["targets", "labels", "_labels"])
def test_labels_that_a_dataset_carries(attribute: str) -> None:
    dataset = Listed(square(8), square(8), square(8))
    setattr(dataset, attribute, [2, 0, 1])
    found = DatasetReader(dataset).labels()
    assert found is not None
    assert found.tolist() == [2, 0, 1]
    setattr(dataset, attribute, [2, 0])  # of something else
    assert DatasetReader(dataset).labels() is None


def test_labels_and_images_of_timms_readers_are_read_below_it(tmp_path: Path) -> None:
    part = files(tmp_path, 2)
    samples = [(path, 7 - i) for i, path in enumerate(part.paths)]

    class Reader(list):  # type: ignore[type-arg]
        def filename(self, index: int) -> str:
            return self[index][0].name

    dataset = Listed(None, None)
    dataset.reader = Reader(samples)  # type: ignore[attr-defined]
    reader = DatasetReader(dataset)
    image, label = reader.read(1)
    with image:
        assert (image.size, label, reader.name(1), reader.labels()) == ((32, 32), 6, "1.png", None)
    dataset.reader.samples = samples  # type: ignore[attr-defined]
    assert DatasetReader(dataset).labels().tolist() == [7, 6]  # type: ignore[union-attr]
    del dataset.reader.samples  # type: ignore[attr-defined]
    dataset.reader.iter_targets = lambda: iter([3, 4])  # type: ignore[attr-defined]
    assert DatasetReader(dataset).labels().tolist() == [3, 4]  # type: ignore[union-attr]


def test_a_few_names_are_told_whole() -> None:
    assert (listed("abc", 3), listed("abcd", 3), listed([])) == ("a, b, c", "a, b, c and 1 more", "")


def test_lists_and_tuples_are_arrays() -> None:
    pair = (np.zeros((2, 4, 4)), [0, 1])
    assert from_python(pair).name == from_python(list(pair)).name == "arrays"
    assert from_python(Listed(square(4))).name == "Listed"


class Starved(Listed):
    """Memory runs out at its last image."""

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if index == len(self) - 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return super().__getitem__(index)


class StarvedStream(Stream):
    def __iter__(self) -> Iterator[tuple[Any, int]]:
        yield square(8), 0
        raise MemoryError


@pytest.mark.parametrize("use", [shape_of, partial(decode, size=8, in_chans=3), partial(survey, size=8, in_chans=3)])
def test_memory_that_runs_out_is_no_unreadable_image(use: Any) -> None:
    with pytest.raises(MemoryError, match="memory ran out while item 2 was read"):
        use(DatasetReader(Starved(*[square(8)] * 3)))
    if "survey" not in str(use):
        with pytest.raises(MemoryError):
            use(StreamReader(StarvedStream()))
    with pytest.raises(RuntimeError, match="allocate memory"):
        items(Starving(count=1))[0]


class Starving(Gaps):
    """One position, at which memory runs out."""

    def open(self, position: int) -> int:
        return Starved(0)[position]


@pytest.mark.parametrize("key", ["train", "training"])
def test_names_of_classes_are_those_of_train_whatever_it_is_called(key: str) -> None:
    named = Listed(square(4))
    named.classes = ("car", "ship")  # type: ignore[attr-defined]
    assert from_python({"test": Listed(square(4)), key: named}).class_names == ("car", "ship")
