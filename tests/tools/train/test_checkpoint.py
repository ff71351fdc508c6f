"""A run of the main job that ends early goes on where it was, and never leaves half a file."""

import copy
import json
import pickle
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tools.common.optimizers import OPTIMIZERS
from tools.train import __main__ as train
from tools.train.checkpoint import save_checkpoint

QUICK = ["--epochs", "1", "--batch-size", "64", "--evaluations", "4", "--batch-norm"]


def evaluations(out: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines if line["kind"] == "evaluation"]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was interrupted right after its second evaluation."""
    out, saved = tmp_path_factory.mktemp("interrupted"), 0

    def save(*arguments: Any) -> None:
        nonlocal saved
        save_checkpoint(*arguments)
        saved += 1
        if saved == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train, "save_checkpoint", save)
        assert train.main([*QUICK, "--out", str(out)]) == train.INTERRUPTED
    return out


@pytest.fixture
def begun(interrupted: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(interrupted, tmp_path / "begun"))


def test_a_run_that_goes_on_has_the_numbers_of_one_that_was_never_interrupted(
    begun: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = tmp_path_factory.mktemp("whole")
    assert train.main([*QUICK, "--out", str(whole)]) == 0
    assert len(evaluations(begun)) == 4
    assert train.main([*QUICK, "--out", str(begun), "--resume"]) == 0
    assert evaluations(begun) == evaluations(whole)
    ends = [torch.load(out / "checkpoint.pt", weights_only=True)["contenders"] for out in (begun, whole)]
    for method in ("bp", "decorr"):
        for key, value in ends[0][method]["model"].items():
            assert torch.equal(value, ends[1][method]["model"][key]), key


def test_a_run_that_is_done_is_only_told_again(begun: Path) -> None:
    for _ in range(2):
        assert train.main([*QUICK, "--out", str(begun), "--resume"]) == 0
    assert len(evaluations(begun)) == 12  # 5 of each method, and one more for the steps left over


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on_from_its_state(name: str) -> None:
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(4))]
    copies = [torch.nn.Parameter(w.detach().clone()) for w in weights]
    first, second = (OPTIMIZERS[name](parameters, lr=0.1) for parameters in (weights, copies))
    gradients = torch.randn(6, 16)
    steps(first, weights, gradients[:3])
    for copied, own in zip(copies, weights, strict=True):
        copied.data.copy_(own.data)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(first, weights, gradients[3:])
    steps(second, copies, gradients[3:])
    assert all(torch.equal(own, other) for own, other in zip(weights, copies, strict=True))


def steps(optimizer: torch.optim.Optimizer, weights: list[torch.nn.Parameter], gradients: torch.Tensor) -> None:
    for gradient in gradients:
        weights[0].grad, weights[1].grad = gradient[:12].reshape(4, 3).clone(), gradient[12:].clone()
        optimizer.step()


class Malicious:
    """A pickle that would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.write_text, (self.path, "gotcha")


def damage(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[: len(whole) // 2] = bytes(len(whole) // 2)
    path.write_bytes(whole)


def flip_a_bit(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)


def replace_by_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Malicious(path.with_name("gotcha")), protocol=2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:10_000]), "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (damage, "cannot be read"),
        (flip_a_bit, "in it is damaged"),
        (replace_by_pickle, "cannot be read"),
        (lambda path: torch.save({"model": torch.ones(3)}, path), "cannot be read"),
        (lambda path: torch.save([1, 2], path), "cannot be read"),
    ],
    ids=["missing", "truncated", "empty", "damaged", "one bit", "malicious", "of something else", "a list"],
)
def test_a_checkpoint_that_cannot_be_used_is_named(
    begun: Path, change: Callable[[Path], object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(begun / "checkpoint.pt")
    before = sorted(path.name for path in begun.iterdir())
    assert train.main([*QUICK, "--out", str(begun), "--resume"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "checkpoint.pt" in error
    assert len(error.splitlines()) == 1
    assert sorted(path.name for path in begun.iterdir()) == before
    assert len(evaluations(begun)) == 4  # what was there before is still there


def test_a_checkpoint_of_other_settings_is_refused(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*QUICK, "--out", str(begun), "--resume", "--rank", "8"]) == 2
    assert "--rank 32, not 8" in capsys.readouterr().err
    assert train.main([*QUICK, "--out", str(begun), "--resume", "--rule", "crgd"]) == 2
    assert "--rule power, not crgd" in capsys.readouterr().err


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Let no file grow larger than so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_last_checkpoint_whole(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (begun / "checkpoint.pt").read_bytes()
    with disk_of(100_000):
        assert train.main([*QUICK, "--out", str(begun), "--resume"]) == 2
    assert "make room" in capsys.readouterr().err
    assert (begun / "checkpoint.pt").read_bytes() == before
    assert not [path for path in begun.iterdir() if path.name.startswith(".")]
