from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRINT = "from capnas._timm import timm; import torch; print(timm.__name__, hasattr(torch.ops.torchvision, 'nms'))"


def imported(folder: Path, torchvision: str) -> subprocess.CompletedProcess[str]:
    """Imports timm in a new process, beside a torchvision of the given lines."""
    for name, text in (("torchvision", torchvision), ("timm", "import torchvision\n")):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(text)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    return subprocess.run([sys.executable, "-c", PRINT], env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("torchvision", "declared"),
    [("", False), ("import torch\ntorch.library.register_fake('torchvision::nms')(lambda *boxes: boxes)\n", True)],
    ids=["operators not asked for", "operators missing"],
)
def test_operators_are_declared_where_torchvision_misses_them(torchvision: str, declared: bool, tmp_path: Path) -> None:
    done = imported(tmp_path, torchvision)
    assert (done.returncode, done.stdout) == (0, f"timm {declared}\n"), done.stderr


@pytest.mark.parametrize("error", ["RuntimeError('operator torchvision::roi_align does not exist')", "ImportError('no libpng')"])
def test_any_other_failure_of_torchvision_is_passed_on(error: str, tmp_path: Path) -> None:
    once = tmp_path / "once"  # a second import would go well
    fails = f"if not (once := pathlib.Path({str(once)!r})).exists():\n    once.touch()\n    raise {error}\n"
    done = imported(tmp_path, f"import pathlib\n{fails}")
    assert done.returncode == 1
    assert done.stderr.strip().endswith(error.replace("('", ": ").removesuffix("')"))
