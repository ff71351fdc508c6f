"""The zoo, run for real on one small model of each library, and seen to fail where it should."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decorr_fx import Report
from decorr_fx.runtime.site.spec import SkippedRecord
from tools.common.errors import UsageError
from tools.zoo import check as zoo_check
from tools.zoo.__main__ import main
from tools.zoo.check import check_model
from tools.zoo.compare import Failed, largest_error
from tools.zoo.examples import Example
from tools.zoo.pool import Pool, Task, load_library
from tools.zoo.record import STAGES, Record
from tools.zoo.results import LibraryResults, read_results
from tools.zoo.settings import Limits, matches
from tools.zoo.weights import WeightFinder, layer_weights, parameter_names, split_weights

ROOT = Path(__file__).parents[3]
QUICK = Limits(onnx=False)


class Attentive(nn.Module):
    """Layers of several kinds, one weight that is computed, and one that is read by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.own = nn.Parameter(torch.randn(4, 8))
        self.scaled = nn.Parameter(torch.randn(4, 4))
        self.scale = nn.Parameter(torch.ones(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.attention(x, x, x)[0]
        return F.linear(F.linear(x, self.own), self.scaled * self.scale)


def small() -> Example:
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3))
    return Example(model, (torch.randn(4, 6),))


def run(out: Path, *arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    code = main(["--out", str(out), *arguments])
    files = [json.loads(path.read_text()) for path in sorted(out.glob("zoo-*.json"))]
    return code, {record["name"]: record for file in files for record in file["models"]}


def test_one_model_of_each_library_passes_every_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for library, name in (("torchvision", "squeezenet1_1"), ("timm", "starnet_s050"), ("transformers", "bert")):
        code, records = run(tmp_path, "--library", library, name, "--memory-limit", "8")
        record = records[name]
        assert code == 0, record
        assert record["weights"] == record["sites"] > 0
        assert {"train", "eval", "fold"} <= record["errors"].keys()
        assert list(record["seconds"]) == ["build", "transform", "train", "eval", "step", "fold", "reload", "onnx"]
        assert record["onnx"] == "exported" or "plain does not export" in record["onnx"]
        assert f"{library}: 1 passed, 0 failed" in capsys.readouterr().out
    assert main(["--coverage", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[2:]] == ["torchvision", "timm", "transformers"]
    assert all("| 1" in line and "100.0" in line for line in lines[2:])


def test_the_lists_are_as_long_as_promised() -> None:
    torchvision, timm, transformers = map(load_library, ("torchvision", "timm", "transformers"))
    assert len(torchvision.models) + len(torchvision.skipped) >= 120
    assert all(name.startswith("quantized_") and reason for name, reason in torchvision.skipped.items())
    assert len(timm.models) >= 150
    assert len(transformers.models) >= 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--library", "torchvision", "-k", "resnet81"], "matches no model"),
        (["--library", "torchvision", "-k", "resnet and"], "not an expression"),
        (["--library", "torchvision", "-k", "a;b"], "use words"),
        (["--library", "torchvision", "resnet81"], "did you mean resnet18"),
        (["--library", "torchvision", "--device", "cuda:9"], "--device"),
        (["--library", "keras"], "invalid choice"),
        (["--jobs", "0"], "not at least 1"),
        (["--time-limit", "nan"], "finite number above 0"),
        (["--coverage"], "run python -m tools.zoo first"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_code_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path), *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_a_damaged_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "zoo-timm.json").write_text('{"models": 3')
    assert main(["--coverage", "--out", str(tmp_path)]) == 2
    assert str(tmp_path / "zoo-timm.json") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("limit", "reason"), [("--time-limit", "time limit: more than 0.01 s"), ("--memory-limit", "memory limit: more")]
)
def test_a_limit_that_strikes_names_model_stage_and_reason(
    limit: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, records = run(tmp_path, "--library", "torchvision", "vgg11", limit, "0.01", "--no-onnx")
    assert code == 1
    assert records["vgg11"]["status"] == "failed"
    assert records["vgg11"]["stage"] in STAGES
    assert reason in records["vgg11"]["reason"]
    assert "FAILED torchvision:vgg11 at " in capsys.readouterr().out


def test_a_process_that_dies_costs_its_model_only() -> None:
    tasks = [Task("torchvision", name, QUICK) for name in ("no_such_model", "squeezenet1_1")]
    records = {task.name: record for task, record in Pool(1).check(tasks)}
    assert records["no_such_model"].status == "failed"
    assert "KeyError" in records["no_such_model"].reason
    assert records["squeezenet1_1"].status == "passed", records["squeezenet1_1"]


def test_a_small_model_passes() -> None:
    record = check_model("small", small, QUICK)
    assert record.status == "passed", record
    assert (record.weights, record.sites) == (2, 2)


def without_last(model: nn.Module) -> nn.Module:
    return nn.Sequential(*list(model)[:-1])  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("verb", "broken", "stage", "reason"),
    [
        ("transform", lambda model: 1 / 0, "transform", "ZeroDivisionError"),
        ("report", lambda model: Report((), ()), "transform", "2 weights are neither sites nor listed"),
        ("stats", lambda model: 1 / 0, "step", "ZeroDivisionError"),
        ("fold", lambda model: nn.ModuleList(), "fold", "is a ModuleList, not a Sequential"),
        ("fold", without_last, "fold", "other keys"),
    ],
)
def test_a_broken_verb_fails_at_its_stage(
    verb: str, broken: Callable[..., Any], stage: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"decorr_fx.{verb}", broken)
    record = check_model("small", small, QUICK)
    assert (record.status, record.stage) == ("failed", stage)
    assert reason in record.reason


@pytest.mark.parametrize(("factor", "mode"), [(1.01, "train"), (1.000001, "eval")])
def test_outputs_that_change_are_seen(factor: float, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = zoo_check.decorr_fx.transform

    def spoiled(model: nn.Module) -> nn.Module:
        with torch.no_grad():
            next(model.parameters()).mul_(factor)
        return real(model)

    monkeypatch.setattr("decorr_fx.transform", spoiled)
    record = check_model("small", small, QUICK)
    assert (record.stage, f"outputs in {mode} mode differ" in record.reason) == (mode, True), record


def test_outputs_that_change_by_folding_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = zoo_check.decorr_fx.fold

    def spoiled(model: nn.Module) -> nn.Module:
        folded = real(model)
        with torch.no_grad():
            next(folded.parameters()).mul_(1.000001)
        return folded

    monkeypatch.setattr("decorr_fx.fold", spoiled)
    record = check_model("small", small, QUICK)
    assert (record.stage, "outputs after folding differ" in record.reason) == ("fold", True), record


def test_gradients_go_through_R(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decorr_fx.runtime.step.batch.gradients_to_z", lambda *arguments: 1 / 0)
    record = check_model("small", small, QUICK)
    assert (record.stage, "ZeroDivisionError" in record.reason) == ("step", True), record


def test_an_R_that_stands_still_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.zoo.step.torch.optim.SGD", StandingStill)
    record = check_model("small", small, QUICK)
    assert record.stage == "step", record
    assert "took no step" in record.reason


class StandingStill:
    """An optimizer that does nothing."""

    def __init__(self, parameters: Any, lr: float) -> None:
        self.parameters = list(parameters)

    def step(self) -> None:
        """Do nothing."""


def test_weights_are_found_without_the_library() -> None:
    model = Attentive()
    finder = WeightFinder(model)
    with finder:
        model(torch.randn(2, 3, 8))
    names = parameter_names(model)
    found = {names[key][0] for key in finder.found | layer_weights(model)}
    assert found == {"first.weight", "attention.in_proj_weight", "attention.out_proj.weight", "own", "scaled"}
    report = Report(
        (), (SkippedRecord("attention", "MultiheadAttention", "why"), SkippedRecord("", "Attentive", "why"))
    )
    _, listed, unexplained = split_weights([[name] for name in sorted(found)], report)
    assert set(listed) == {"attention.in_proj_weight", "attention.out_proj.weight", "own", "scaled"}
    assert unexplained == ["first.weight"]


def test_errors_are_relative_and_shapes_compared() -> None:
    assert largest_error({"a": torch.tensor([10.0, 1.0])}, {"a": torch.tensor([10.0, 2.0])}) == pytest.approx(0.1)
    assert largest_error(torch.tensor([torch.nan, -torch.inf]), torch.tensor([torch.nan, -torch.inf])) == 0
    assert largest_error(torch.tensor([1.0, torch.nan]), torch.ones(2)) == torch.inf
    with pytest.raises(Failed, match=r"float32\[2\], not float32\[3\]"):
        largest_error(torch.ones(2), torch.ones(3))
    with pytest.raises(Failed, match="no tensor"):
        largest_error(None, None)


def test_expressions() -> None:
    assert matches("resnet18", "resnet and not (34 or 50)")
    assert not matches("resnet34", "resnet and not (34 or 50)")
    assert matches("xlm-roberta", "lm-r")
    with pytest.raises(UsageError):
        matches("resnet18", "resnet 18")


def test_resume_and_parts_keep_what_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.zoo.pool.Pool.check", lambda self, tasks: [(task, Record(task.name)) for task in tasks])
    arguments = ("--library", "torchvision", "-k", "alexnet or vgg11")
    assert len(run(tmp_path, *arguments)[1]) == 3
    path = tmp_path / "zoo-torchvision.json"
    before = read_results(path)
    assert before is not None
    before.records[0].fail("fold", "to be seen again")
    before.records[1].parameters = 7
    LibraryResults(before.header, before.records).write(tmp_path)
    _, records = run(tmp_path, *arguments, "--resume")
    assert (records["alexnet"]["status"], records["vgg11"]["parameters"]) == ("passed", 7)
    assert len(run(tmp_path, "--library", "torchvision", "resnet18")[1]) == 4
    assert len(run(tmp_path, "--library", "torchvision", "resnet18", "--no-onnx")[1]) == 1  # other stages: starts anew


def test_ctrl_c_tells_and_keeps_what_was_checked(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.zoo", "--library", "torchvision", "--no-onnx", "-k",
               "alexnet or vgg", "--out", str(tmp_path)]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    path = tmp_path / "zoo-torchvision.json"
    for _ in range(600):
        if path.exists() and '"alexnet"' in path.read_text():
            break
        time.sleep(0.1)
    process.send_signal(2)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "interrupted" in out
    assert "Traceback" not in error
    assert "alexnet" in [record["name"] for record in json.loads(path.read_text())["models"]]


def test_checks_end_with_a_zoo_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.zoo", "--library", "torchvision", "--no-onnx", "-k", "vgg", "--out"]
    zoo = psutil.Popen([*command, str(tmp_path)], stdout=subprocess.DEVNULL, cwd=ROOT)
    while not (checks := [check for server in zoo.children() for check in server.children()]):
        assert zoo.poll() is None
        time.sleep(0.1)
    zoo.kill()
    zoo.wait()
    _, running = psutil.wait_procs(checks, timeout=20)
    assert not running
