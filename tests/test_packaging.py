from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    pytest.importorskip("setuptools")
    out = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.split("\n") if listed.returncode == 0 else [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if p.is_file()]
    for name in filter(None, names):
        if name.startswith(("capnas/", "search_spaces/", "pyproject", "README", "LICENSE")) and (ROOT / name).is_file():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(source)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_wheel_holds_spaces_data_licence_and_types(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    spaces = {f"capnas/search_spaces/{path.name}" for path in (ROOT / "search_spaces").glob("*.py")}
    assert len(spaces) >= 9
    assert spaces <= names
    assert {"capnas/py.typed", "capnas/embedded/LICENSE-fashion-mnist", "capnas/data/__init__.py", "capnas/measures/saturation.py"} <= names
    images = [i for i in wheel.infolist() if i.filename.endswith(".npz")]
    assert [i.filename for i in images] == ["capnas/embedded/fashion-mnist-12k.npz"]
    assert 3e6 < images[0].file_size < 8e6
    assert any(name.endswith("entry_points.txt") for name in names)
    assert not any(name.startswith(("tests", "results")) for name in names)


def test_every_package_of_the_source_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "capnas").rglob("*.py")}
    tracked = subprocess.run(["git", "ls-files", "capnas"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode == 0:
        modules &= set(tracked.stdout.split("\n"))
    assert modules <= set(wheel.namelist())


def test_wheel_works_from_anywhere(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    code = ("import sys; sys.path.insert(0, 'site'); import capnas; assert 'site' in capnas.__file__, capnas.__file__\n"
            "print(len(capnas.list_spaces()), capnas.load_data('fashion-mnist-12k').sizes)")  # fmt: skip
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip() == "8 {'train': 9000, 'validation': 1000, 'test': 2000}"


def test_editable_install_finds_spaces_and_data(tmp_path: Path) -> None:
    code = "import capnas._timm, capnas.search_spaces.resnet as r, capnas; print(r.__name__, capnas.load_data().name)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip() == "capnas.search_spaces.resnet fashion-mnist-12k"
