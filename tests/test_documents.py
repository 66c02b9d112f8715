"""What is stored is plain JSON, and a file is there whole or not at all."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from capnas.documents import json_text, plain, write_whole


@dataclass(frozen=True)
class Row:
    size: int
    shares: tuple[float, ...]


def test_numbers_of_numpy_dataclasses_and_paths_become_json() -> None:
    document = {1: np.int64(3), "row": Row(size=np.int32(2), shares=(np.float32(0.5), np.inf)), "at": Path("a/b"), "on": True, "no": None}
    expected = {"1": 3, "row": {"size": 2, "shares": [0.5, None]}, "at": "a/b", "on": True, "no": None}
    assert plain(document) == expected
    assert json.loads(json_text(document)) == expected
    assert [plain(v) for v in (np.bool_(True), torch.tensor(2), torch.tensor(float("nan")))] == [True, 2, None]


@pytest.mark.parametrize("content", ["new\r\n", b"\x00new"])
def test_a_file_is_replaced_as_it_was_given(tmp_path: Path, content: str | bytes) -> None:
    (tmp_path / "file").write_text("old", encoding="utf-8")
    write_whole(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_fails_midway_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("old", encoding="utf-8")

    def full(*paths: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space") as caught:
        write_whole(tmp_path / "file", "new")
    assert caught.value.filename == str(tmp_path / "file")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_whole(tmp_path / "pipe", "new")
    assert os.read(reader, 9) == b"new"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("name", ["folder", "no/file", "plain/file"])
def test_an_error_names_the_file_that_was_asked_for(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "plain").touch()
    with pytest.raises(OSError, match=r"^\[Errno \d+\] .*: ") as caught:
        write_whole(tmp_path / name, "new")
    assert (caught.value.filename, caught.value.filename2) == (str(tmp_path / name), None)


def test_the_path_of_a_folder_is_an_error_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=r"'\.'"):
        write_whole(Path("."), "page")
    assert not list(tmp_path.iterdir())


def test_a_link_stays_one_and_a_file_keeps_its_mode(tmp_path: Path) -> None:
    target, link = tmp_path / "target.py", tmp_path / "link.py"
    target.write_text("old")
    target.chmod(0o755)
    link.symlink_to(target)
    write_whole(link, "new")
    assert link.is_symlink()
    assert (target.read_text(), target.stat().st_mode & 0o777) == ("new", 0o755)
