"""The main job, run for real on a few batches."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from tools.train.__main__ import main
from tools.train.loop import Contender
from tools.train.models import build_model
from tools.train.settings import parse_settings
from tools.train.sources import load_data

ROOT = Path(__file__).parents[3]
QUICK = ["--epochs", "1", "--batch-size", "256", "--evaluations", "2"]


def run(out: Path, *arguments: str) -> list[dict[str, object]]:
    assert main([*QUICK, "--out", str(out), *arguments]) == 0
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_files_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "metrics.jsonl", "curves.png", "correlations.png", "model.onnx", "checkpoint.pt"
    }  # fmt: skip
    assert lines[0]["kind"] == "settings"
    assert lines[0]["torch"] == torch.__version__
    first, second = [line for line in lines if line["kind"] == "evaluation"][:2]
    assert first["val_loss"] == second["val_loss"]  # the same initial weights
    results = {line["method"]: line for line in lines if line["kind"] == "result"}
    assert set(results) == {"bp", "decorr"}
    assert results["bp"]["steps"] == results["decorr"]["steps"] > 0
    printed = capsys.readouterr().out
    assert "decorrelation" in printed
    assert "4 Conv" in printed
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    (logits,) = session.run(None, {session.get_inputs()[0].name: np.zeros((3, 1, 8, 8), np.float32)})
    assert logits.shape == (3, 10)


def test_with_R_kept_still_both_methods_are_one_and_the_same(tmp_path: Path) -> None:
    """The comparison is fair: same weights, same batches, same order; only R makes a difference."""
    lines = run(tmp_path, "--rule", "dbp", "--decor-lr", "0", "--evaluations", "5", "--model", "mlp")
    by_method = [
        [e["val_loss"] for e in lines if e["kind"] == "evaluation" and e["method"] == m] for m in ("bp", "decorr")
    ]
    assert by_method[0] == pytest.approx(by_method[1], rel=1e-5)
    assert len(set(by_method[0])) > 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "vit", "--optimizer", "adamw", "--amp"],
        ["--model", "mlp", "--batch-norm", "--optimizer", "sgd", "--method", "decorr", "--rule", "crgd"],
        ["--model", "cnn", "--method", "bp"],
        ["--model", "mlp", "--compile", "--method", "decorr", "--update-every", "3"],
        ["--model", "squeezenet1_1", "--size", "32", "--batch-size", "512", "--method", "decorr"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)  # fmt: skip
def test_the_other_models_and_options_run(arguments: list[str], tmp_path: Path) -> None:
    lines = run(tmp_path, *arguments)
    assert all(line["test_accuracy"] is not None for line in lines if line["kind"] == "result")
    assert (tmp_path / "model.onnx").is_file()


def test_fashion_mnist_is_read_flat_or_in_torchvision_s_folders(fashion: Path, tmp_path: Path) -> None:
    arguments = ["--data", "fashion-mnist", "--data-dir", str(fashion)]
    data = load_data(parse_settings(arguments))
    assert data.shape == (1, 28, 28)
    assert (len(data.train), len(data.validation), len(data.test)) == (480, 120, 100)
    raw = tmp_path / "torchvision" / "FashionMNIST" / "raw"
    shutil.move(fashion, raw)
    assert len(load_data(parse_settings([*arguments[:3], str(raw.parent.parent)])).test) == 100


def test_a_folder_of_images(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 3)):
        for label in ("cat", "dog"):
            folder = tmp_path / "data" / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(random.integers(0, 255, (40, 48, 3), np.uint8)).save(folder / f"{i}.png")
    arguments = ["--data", "imagefolder", "--data-dir", str(tmp_path / "data"), "--size", "16", "--batch-size", "4"]
    lines = run(tmp_path / "out", *arguments)
    assert lines[-1]["steps"] == 4  # 24 images less 5 for validation, in batches of 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "fashion-mnist", "--data-dir", "/nowhere"], "dataset-fashion-mnist"),
        (["--data", "cifar10", "--data-dir", "/nowhere"], "--download"),
        (["--data", "imagefolder"], "needs --data-dir"),
        (["--model", "resnet81"], "did you mean"),
        (["--model", "inception_v3"], "another --size"),
        (["--device", "cuda:9"], "--device"),
        (["--rule", "dbp", "--kappa", "2"], "kappa is 2"),
        (["--rule", "dbp", "--decor-lr", "nan"], "decor_lr is nan"),
        (["--kappa", "0.2"], "the rule power has no setting 'kappa'; it is one of dbp"),
        (["--rule", "crgd", "--rank", "8"], "the rule crgd has no setting 'rank'; it is one of power"),
        (["--rule", "dbp-normalized"], "invalid choice"),
        (["--batch-size", "9999"], "training images"),
        (["--lr", "0"], "--lr"),
        (["--out", "/proc/nowhere"], "--out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_code_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = [] if "--out" in arguments else ["--out", str(tmp_path)]
    assert main([*QUICK, *out, *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_a_damaged_file_is_named(fashion: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = fashion / "train-images-idx3-ubyte.gz"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    assert main(["--data", "fashion-mnist", "--data-dir", str(fashion), "--out", str(tmp_path / "out")]) == 2
    assert str(damaged) in capsys.readouterr().err


def test_ctrl_c_tells_what_was_reached(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.train", "--epochs", "5000", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    metrics = tmp_path / "metrics.jsonl"
    for _ in range(600):
        if metrics.exists() and metrics.read_text().count("\n") >= 5:
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert "interrupted" in out
    assert "decorrelation" in out
    assert "Traceback" not in error


def test_warming_up_leaves_nothing_behind() -> None:
    settings = parse_settings(["--model", "cnn", "--batch-norm"])
    model = build_model("cnn", (1, 8, 8), 10, 4, batch_norm=True)
    contender = Contender("bp", model, settings, steps=3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    contender.warm_up((torch.randn(4, 1, 8, 8), torch.arange(4)))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
