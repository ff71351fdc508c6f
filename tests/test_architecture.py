"""The rooms of the package: each may import what stands before it in the order, read from the source."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import decorr_fx

ROOT = Path(__file__).parent.parent
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removeprefix("decorr_fx."): path
    for path in [*ROOT.glob("decorr_fx/**/*.py"), *ROOT.glob("passes/**/*.py")]
    if path.name != "__init__.py" and "decorr_fx/passes" not in path.as_posix()
}
# A module belongs to the longest of these names that it starts with; it may import its own room and those before it.
ROOMS = [
    "errors", "config", "inputs", "ops", "ops.rules", "ops.prune", "runtime.private", "runtime.site",
    "runtime.step", "runtime",
    "passes.base", "passes.copies", "passes.capture", "passes.match", "passes.plan", "passes.rewrite", "passes",
    "inspection", "api",
]  # fmt: skip
STDLIB_AND_TORCH = {"torch", *sys.stdlib_module_names}
FORBIDDEN = {"ops": {"torch.fx", "torch.distributed", "onnx"}, "runtime": {"torch.fx", "onnx"}}
THIRD_PARTY = {"runtime": {"tabulate"}, "passes": {"onnx", "onnxruntime", "onnxscript", "tabulate", "tqdm"}}


def room(module: str) -> int:
    """Return the number of the room of a module of the package."""
    inside = [name for name in ROOMS if module == name or module.startswith(f"{name}.")]
    return ROOMS.index(max(inside, key=len))


def imports(path: Path) -> set[str]:
    """Return the dotted names of all that a file imports, with the names taken from a module appended to it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def ours(path: Path) -> set[str]:
    """Return the modules of the package that a file imports, like `runtime.site.state`."""
    names = {name.removeprefix("decorr_fx.") for name in imports(path) if name.startswith("decorr_fx.")}
    return {name if name in SOURCES else name.rpartition(".")[0] for name in names}


@pytest.mark.parametrize("module", SOURCES)
def test_each_room_imports_only_what_stands_before_it(module: str) -> None:
    path, floor = SOURCES[module], module.partition(".")[0]
    for imported in ours(path):
        assert room(imported) <= room(module), f"{module} imports {imported}"
    for imported in imports(path):
        top = imported.split(".")[0]
        assert top in {"decorr_fx", *STDLIB_AND_TORCH, *THIRD_PARTY.get(floor, set())}, f"{module} imports {imported}"
        for forbidden in FORBIDDEN.get(floor, set()):
            assert imported != forbidden and not imported.startswith(f"{forbidden}."), f"{module} imports {imported}"


def test_there_are_no_cycles() -> None:
    graphlib.TopologicalSorter({module: ours(path) for module, path in SOURCES.items()}).prepare()


def test_the_check_can_fail(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("from torch import fx\nfrom decorr_fx.passes.rewrite.insert import InsertDecorrelation\n")
    assert "torch.fx" in imports(bad)
    assert ours(bad) == {"passes.rewrite.insert"}
    assert room("passes.rewrite.insert") > room("passes.plan") > room("passes.match.calls") > room("ops.cost")


def test_the_public_names_are_documented() -> None:
    for name in decorr_fx.__all__:
        assert getattr(decorr_fx, name).__doc__, name


@pytest.mark.parametrize("command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]])
def test_the_source_is_typed_and_tidy(command: list[str]) -> None:
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
