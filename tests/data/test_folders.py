from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from capnas.data.folders import read_folder
from capnas.errors import DataError


def put(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)


def fill(root: Path, classes: str = "ab", count: int = 2) -> Path:
    put(*(root / c / f"{i}.png" for c in classes for i in range(count)))
    return root


def test_one_folder_of_classes(tmp_path: Path) -> None:
    fill(tmp_path)
    put(tmp_path / "a" / "deeper" / "x.JPG", tmp_path / "a" / ".hidden.png")
    (tmp_path / "README.txt").write_text("notes are ignored")
    (tmp_path / "a" / "notes.csv").write_text("1")
    found = read_folder(tmp_path)
    assert list(found.parts) == ["train"]
    assert found.class_names == ("a", "b")
    assert found.parts["train"].labels().tolist() == [0, 0, 0, 1, 1]  # type: ignore[union-attr]


def test_classes_in_natural_order(tmp_path: Path) -> None:
    put(*(tmp_path / name / "x.png" for name in ("10", "9", "1", "1²")))  # a square is a digit of no number
    assert read_folder(tmp_path).class_names == ("1", "1²", "9", "10")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("train", "val"), {"train": "train", "validation": "val"}),
        (("train", "test"), {"train": "train", "test": "test"}),
        (("Training", "valid", "testing"), {"train": "Training", "validation": "valid", "test": "testing"}),
        (("train",), {"train": "train"}),
    ],
)
def test_splits(tmp_path: Path, given: tuple[str, ...], expected: dict[str, str]) -> None:
    for split in given:
        fill(tmp_path / split)
    (tmp_path / "docs").mkdir()
    parts = read_folder(tmp_path).parts
    assert {split: part.name(0).split("/")[0] for split, part in parts.items()} == expected  # type: ignore[union-attr]


def test_train_can_be_a_class(tmp_path: Path) -> None:
    put(*(tmp_path / c / "x.png" for c in ("car", "train")))
    assert read_folder(tmp_path).class_names == ("car", "train")


@pytest.mark.parametrize(("link", "target", "back"), [("a/deep/loop", "..", "a"), ("a/loop", "..", ""), ("c", "..", ".."), ("c", ".", "")])
def test_a_link_that_leads_back_is_refused(tmp_path: Path, link: str, target: str, back: str) -> None:
    for split in ("", "train"):
        root = tmp_path / f"pictures{split}"
        folder = fill(root / split)
        put(folder / "a" / "deep" / "x.png")
        (folder / link).symlink_to(target)
        place = (folder / back).resolve()
        with pytest.raises(DataError, match=f"^{folder / link} leads back to {place}, in which it lies: .*take the link away"):
            read_folder(root)


def test_a_folder_that_is_linked_to_is_read_once_in_a_class(tmp_path: Path) -> None:
    root = fill(tmp_path / "pictures")
    put(tmp_path / "more" / "x.png", root / "a" / "z" / "y.png")
    for name in ("first", "second"):
        (root / "a" / name).symlink_to(tmp_path / "more")
    (root / "a" / "again").symlink_to("z")
    (root / "b" / "more").symlink_to(tmp_path / "more")
    part = read_folder(root).parts["train"]
    names = [part.name(i) for i in range(len(part.labels()))]  # type: ignore[union-attr]
    assert names == ["a/0.png", "a/1.png", "a/first/x.png", "a/z/y.png", "b/0.png", "b/1.png", "b/more/x.png"]


def test_wrong_layouts(tmp_path: Path) -> None:
    def told(name: str, text: str) -> None:
        with pytest.raises(DataError, match=text):
            read_folder(tmp_path / name)

    put(tmp_path / "loose" / "x.png", tmp_path / "loose" / "y.png")
    told("loose", r"one folder per class, found 2 image files and no folders \(x.png, y.png\)")
    put(fill(tmp_path / "beside") / "x.png")
    told("beside", r"found 1 image files beside 2 class folders \(x.png\)")
    fill(tmp_path / "single", "a")
    told("single", "at least two class folders, found a")
    (tmp_path / "nothing").mkdir()
    told("nothing", "at least two class folders, found none")
    fill(tmp_path / "wrapped" / "inner")
    told("wrapped", r"found inner; is the data set inside, in .*inner\?")
    (fill(tmp_path / "empty") / "c").mkdir()
    told("empty", r"empty/c: expected images \(.png, .*found none; add some or remove the empty class")
    fill(tmp_path / "held" / "val")
    told("held", "expected train/ beside val/, found none")
    fill(tmp_path / "twice" / "train"), fill(tmp_path / "twice" / "val"), fill(tmp_path / "twice" / "valid")
    told("twice", "one folder per split, found both val/ and valid/")
    fill(tmp_path / "other" / "train"), fill(tmp_path / "other" / "val", "abc")
    told("other", r"expected the classes of train \(a, b\), found also c; add them to train or take them away")
    fill(tmp_path / "more" / "train"), fill(tmp_path / "more" / "extra"), put(tmp_path / "more" / "x.png")
    told("more", r"images only in train/, val/ and test/, found also extra/, x.png; move them away")
    fill(tmp_path / "flat" / "train"), put(tmp_path / "flat" / "test" / "1.png")
    told("flat", "flat/test: expected one folder per class, found 1 image files and no folders")


@pytest.mark.parametrize(("first", "second", "text"), [("val", "test", "val/ and test/"), ("train/0", "train/1", "0/ and 1/")])
def test_folders_that_are_one_by_two_names_are_refused(tmp_path: Path, first: str, second: str, text: str) -> None:
    for name in ("train/0", "train/2", "val/0", "val/2"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / name / "a.png")
    (tmp_path / second).symlink_to(tmp_path / first)
    with pytest.raises(DataError, match="are one folder") as refusal:
        read_folder(tmp_path)
    assert all(part in str(refusal.value) for part in text.split(" and "))
