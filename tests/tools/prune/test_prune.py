import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tools.prune.__main__ import main
from tools.prune.methods import Task, macs, prune_all
from tools.prune.nets import NETS

TINY = ["--nets", "vgg", "--seeds", "0", "--data", "digits", "--size", "28", "--epochs", "1", "--batches", "4",
        "--keep", "0.5", "--jobs", "1"]  # fmt: skip


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Search less, time less, and run in this process: tests/tools/study/test_study.py has others."""
    monkeypatch.setattr("tools.prune.methods.HALVINGS", 5)
    monkeypatch.setattr("tools.prune.latency.RUNS", 5)
    monkeypatch.setattr("tools.prune.__main__.perform_all", lambda perform, runs, jobs: map(perform, runs))


def options(tmp_path: Path) -> list[str]:
    return [*TINY, "--weights", str(tmp_path / "weights"), "--out", str(tmp_path / "out")]


def test_methods_are_compared_at_equal_multiply_adds_and_a_second_call_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(options(tmp_path)) == 0
    (line,) = map(json.loads, (tmp_path / "out" / "prune.jsonl").read_text().splitlines())
    rows: list[dict[str, Any]] = line["pruned"]
    assert [(row["method"], row["scope"]) for row in rows[:3]] == [
        ("decorr_fx", "everywhere"), ("l1", "by layer"), ("l1", "everywhere")
    ]  # fmt: skip
    assert len(rows) == 9 and all(0.3 < row["macs"] / line["whole"]["macs"] < 0.51 for row in rows)
    assert len([row for row in rows if row["fine_tuned"] is not None]) == 5
    printed = capsys.readouterr().out
    assert "| vgg       | 100%" in printed and (tmp_path / "out" / "prune.png").stat().st_size > 10_000
    monkeypatch.setattr("tools.prune.__main__.perform", None)
    assert main(options(tmp_path)) == 0  # with nothing left to run
    assert main([*options(tmp_path), "--latency"]) == 0
    timed = json.loads((tmp_path / "out" / "prune-latency.json").read_text())["vgg"]
    assert [(one["round_to"], one["batch"]) for one in timed] == [(1, 1), (1, 128), (16, 1), (16, 128)]
    assert main([*options(tmp_path), "--table"]) == 0 and "pruned (ms)" in capsys.readouterr().out


def test_every_method_leaves_a_network_that_runs_and_the_trained_one_as_it_is() -> None:
    torch.manual_seed(0)
    model = NETS["resnet"]().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    before = [p.clone() for p in model.parameters()]
    task = Task(model, [(torch.randn(128, 1, 28, 28), torch.randint(10, (128,))) for _ in range(2)])
    pruned = list(prune_all(task, 0.6))
    assert len(pruned) == 9
    for one in pruned:
        assert one.model(task.example).shape == (1, 10)
        assert macs(one.model, task.example) <= 0.61 * macs(model, task.example)
    assert all(torch.equal(p, old) and p.grad is None for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--keep", "1.5"], "1.5 is not above 0 and at most 1"),
        (["--nets", "alexnet"], "invalid choice"),
        (["--keep", "0.3"], "--fine-tune 0.5 is none of the budgets of --keep"),
        (["--table"], "prune.jsonl has no run like these"),
        (["--data-dir", "/nowhere", "--data", "fashion-mnist"], "no train-images-idx3-ubyte[.gz] in /nowhere"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(
    arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*options(tmp_path), *arguments]) == 2
    assert told in capsys.readouterr().err


def test_a_damaged_network_is_said_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "vgg-0-1.pt").write_bytes(b"no network")
    assert main(options(tmp_path)) == 2
    assert "does not hold a trained vgg" in capsys.readouterr().err
