"""The main job in several processes, as `torchrun` starts them: one answer, and a clear end where one of them fails."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tools.common.errors import UsageError
from tools.train.__main__ import main
from tools.train.models import build_model

ROOT = Path(__file__).parents[3]
QUICK = ["--epochs", "1", "--evaluations", "2", "--model", "mlp"]


INTERRUPTED = f"""
import sys

sys.path.insert(0, {str(ROOT)!r})
from tools.train import __main__ as train

saved, save = [], train.save_checkpoint


def save_two(*arguments):
    save(*arguments)
    saved.append(arguments)
    if len(saved) == 2:
        raise KeyboardInterrupt


train.save_checkpoint = save_two
sys.exit(train.main())
"""


def start(
    out: Path, *arguments: str, ranks: int = 2, job: Sequence[str] = ("-m", "tools.train")
) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *job]
    command += [*arguments, "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def ranks_of(launcher: "subprocess.Popen[str]") -> list[psutil.Process]:
    children = psutil.Process(launcher.pid).children()
    return sorted((c for c in children if "tools.train" in c.cmdline()), key=lambda c: c.pid)


def wait_for(path: Path, launcher: "subprocess.Popen[str]") -> None:
    for _ in range(600):
        if path.exists():
            return
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.2)
    raise AssertionError(f"{path.name} did not appear")


def lines_of(out: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def results(out: Path) -> dict[str, dict[str, Any]]:
    return {line["method"]: line for line in lines_of(out, "result")}


def evaluations(out: Path) -> dict[tuple[str, int], float]:
    return {(line["method"], line["step"]): line["val_loss"] for line in lines_of(out, "evaluation")}


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


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_goes_on_with_another_number_of_ranks(before: int, after: int, tmp_path: Path) -> None:
    (script := tmp_path / "interrupted.py").write_text(INTERRUPTED)
    out = tmp_path / "out"
    launcher = start(out, *QUICK, ranks=before, job=[str(script)])
    launcher.communicate(timeout=240)
    first = evaluations(out)
    launcher = start(out, *QUICK, "--resume", ranks=after)
    _, error = launcher.communicate(timeout=240)
    assert launcher.returncode == 0, error
    assert main([*QUICK, "--out", str(tmp_path / "whole")]) == 0
    found, expected = evaluations(out), evaluations(tmp_path / "whole")
    assert first.items() < found.items() and found.keys() == expected.keys()
    for evaluation, loss in found.items():
        close = 1e-4 if evaluation[0] == "bp" else 0.05  # R steps on other rows
        assert loss == pytest.approx(expected[evaluation], rel=close), evaluation


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


def test_a_rank_that_meets_nobody_says_so(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    alone = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "1",
    }
    command = [sys.executable, "-m", "tools.train", *QUICK, "--timeout", "2", "--out", str(tmp_path)]
    ended = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **alone}, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode != 0
    assert "rank 0 of 2: another one is gone, or was silent for 2 seconds" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_model_with_auxiliary_outputs_is_refused_on_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.train.models.ranks", lambda: 2)
    with pytest.raises(UsageError, match="googlenet has auxiliary outputs, which several ranks cannot leave alone"):
        build_model("googlenet", (3, 64, 64), 10, 2)
