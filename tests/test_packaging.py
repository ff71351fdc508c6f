"""The wheel: what is in it, and that it works from another place than the checkout."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ["pyproject.toml", "README.md", "LICENSE"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the source, so that nothing is left in the checkout."""
    source = tmp_path_factory.mktemp("source")
    for part in PARTS:
        shutil.copy(ROOT / part, source / part)
    for folder in ("decorr_fx", "passes"):
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_every_module_once_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("decorr_fx/**/*.py")}
    passes = {f"decorr_fx/{path.relative_to(ROOT).as_posix()}" for path in ROOT.glob("passes/**/*.py")}
    assert {name for name in names if name.endswith(".py")} == modules | passes
    assert "decorr_fx/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import decorr_fx, torch; print(decorr_fx.__file__, decorr_fx.transform(torch.nn.Linear(2, 2)))"
    command = [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert str(tmp_path) in result.stdout


def test_the_folder_of_passes_refuses_its_short_name() -> None:
    command = [sys.executable, "-c", "import passes"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "import decorr_fx.passes, not passes" in result.stderr
