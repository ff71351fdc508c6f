"""The main job in several processes, as `torchrun` starts them: one answer, and a clear end where one of them fails."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from train import main

ROOT = Path(__file__).parent.parent.parent
QUICK = ["--epochs", "1", "--evaluations", "2", "--model", "mlp"]


def start(out: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(ROOT / "tools/train.py")]
    command += [*arguments, "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ranks_of(launcher: "subprocess.Popen[str]") -> list[psutil.Process]:
    children = psutil.Process(launcher.pid).children()
    return sorted((c for c in children if any("train.py" in part for part in c.cmdline())), key=lambda c: c.pid)


def wait_for(path: Path, launcher: "subprocess.Popen[str]") -> None:
    for _ in range(600):
        if path.exists():
            return
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.2)
    raise AssertionError(f"{path.name} did not appear")


def results(out: Path) -> dict[str, dict[str, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["method"]: line for line in lines if line["kind"] == "result"}


def test_two_ranks_share_each_batch_and_learn_what_one_learns(tmp_path: Path) -> None:
    launcher = start(tmp_path / "two", *QUICK)
    out, error = launcher.communicate(timeout=240)
    assert launcher.returncode == 0, error
    assert out.count("mean r²") == 1  # the first rank alone tells
    assert main([*QUICK, "--out", str(tmp_path / "one")]) == 0
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    assert two["bp"]["val_loss"] == pytest.approx(one["bp"]["val_loss"], rel=1e-4)
    assert two["decorr"]["val_loss"] == pytest.approx(one["decorr"]["val_loss"], rel=0.05)  # of other rows
    assert {path.name for path in (tmp_path / "two").iterdir()} == {
        "metrics.jsonl", "curves.png", "correlations.png", "model.onnx", "checkpoint.pt"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("end", "messages"),
    [
        # the other rank notices itself, or in the midst of an evaluation the launcher tells it
        (lambda launcher: ranks_of(launcher)[1].kill(), ["rank 0 of 2: another one is gone", "interrupted"]),
        (lambda launcher: launcher.send_signal(signal.SIGINT), ["interrupted: this is what was reached"]),
    ],
    ids=["a killed rank", "Ctrl-C"],
)
def test_an_early_end_is_told_and_the_last_checkpoint_is_whole(
    end: object, messages: list[str], tmp_path: Path
) -> None:
    launcher = start(tmp_path, "--epochs", "5000", "--timeout", "20")
    wait_for(tmp_path / "checkpoint.pt", launcher)
    assert len(ranks_of(launcher)) == 2
    end(launcher)  # type: ignore[operator]
    out, error = launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    assert any(message in out + error for message in messages)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert all(value.isfinite().all() for value in checkpoint["contenders"]["decorr"]["model"].values())
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_batch_that_ranks_cannot_share_is_told(tmp_path: Path) -> None:
    launcher = start(tmp_path, "--batch-size", "63")
    _, error = launcher.communicate(timeout=240)
    assert launcher.returncode != 0
    assert "--batch-size 63 is no multiple of the 2 ranks" in error
