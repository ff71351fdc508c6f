"""The floors of the package: what each room may import, read from the source."""

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
    for path in [*ROOT.glob("decorr_fx/**/*.py"), *ROOT.glob("passes/*.py")]
    if path.name != "__init__.py" and "decorr_fx/passes" not in path.as_posix()
}
STDLIB_AND_TORCH = {"torch", *sys.stdlib_module_names}
BELOW = {
    "errors": set(),
    "config": {"errors"},
    "ops": {"ops", "config", "errors"},
    "runtime": {"runtime", "ops", "config", "errors"},
    "passes": {"runtime", "ops", "config", "errors"},  # and one another as in PASSES
    "api": {"passes", "runtime", "ops", "config", "errors"},
}
PASSES = {
    "base": set(),
    "code": set(),
    "faithful": {"code"},
    "glimpse": {"faithful"},
    "attention": set(),
    "adapters": {"attention"},
    "trace": {"base", "adapters", "faithful", "glimpse"},
    "source": set(),
    "match": {"source"},
    "choose": {"source"},
    "check": set(),
    "weights": {"trace", "match", "source"},
    "readers": {"trace", "code", "source", "weights"},
    "share": {"trace", "match", "weights"},
    "plan": {"trace", "code", "source", "choose", "weights", "readers", "share"},
    "insert": {"base", "match", "plan", "check"},
    "fold": {"base"},
    "example": set(),
    "calibrate": {"base", "example"},
    "measure": {"base", "choose", "example", "plan", "insert"},
    "export": {"base", "example"},
    "units": set(),
    "aten": set(),
    "follow": {"aten", "example", "units"},
    "moments": {"example", "units"},
    "slicing": {"moments", "units"},
    "prune_report": set(),
    "prune": {"base", "choose", "example", "follow", "moments", "prune_report", "slicing", "units"},
}
FORBIDDEN = {"ops": {"torch.fx", "torch.distributed", "onnx"}, "runtime": {"torch.fx", "onnx"}}
THIRD_PARTY = {"runtime": {"tabulate"}, "passes": {"onnx", "onnxruntime", "onnxscript", "tabulate", "tqdm"}}


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
    """Return the modules of the package that a file imports, like `runtime.state`."""
    names = {name.removeprefix("decorr_fx.") for name in imports(path) if name.startswith("decorr_fx.")}
    return {
        ".".join(name.split(".")[: 2 if name.split(".")[0] in ("ops", "runtime", "passes") else 1]) for name in names
    }


@pytest.mark.parametrize("module", SOURCES)
def test_each_room_imports_only_what_its_floor_may(module: str) -> None:
    floor, _, name = module.partition(".")
    path = SOURCES[module]
    for imported in ours(path):
        other, _, other_name = imported.partition(".")
        if floor == other == "passes":
            assert other_name in PASSES[name], f"{module} imports {imported}"
        else:
            assert other in BELOW[floor], f"{module} imports {imported}"
    for imported in imports(path):
        top = imported.split(".")[0]
        assert top in {"decorr_fx", *STDLIB_AND_TORCH, *THIRD_PARTY.get(floor, set())}, f"{module} imports {imported}"
        for forbidden in FORBIDDEN.get(floor, set()):
            assert imported != forbidden and not imported.startswith(f"{forbidden}."), f"{module} imports {imported}"


def test_there_are_no_cycles() -> None:
    graphlib.TopologicalSorter({module: ours(path) for module, path in SOURCES.items()}).prepare()


def test_the_check_can_fail(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("from torch import fx\nfrom decorr_fx.passes.insert import InsertDecorrelation\n")
    assert "torch.fx" in imports(bad)
    assert ours(bad) == {"passes.insert"}


def test_the_public_names_are_documented() -> None:
    for name in decorr_fx.__all__:
        assert getattr(decorr_fx, name).__doc__, name


@pytest.mark.parametrize("command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]])
def test_the_source_is_typed_and_tidy(command: list[str]) -> None:
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
