"""The examples run as a user starts them; their trainers accumulate, cast, save, resume and share R among ranks."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.distributed as dist
import train_accelerate
import train_lightning
import train_transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from ranks import on_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from transformers import ConvNextForImageClassification, Trainer, TrainerCallback, TrainingArguments

import decorr_fx
from decorr_fx import SiteStats, Stats

ROOT = Path(__file__).parent.parent.parent
STEPS = 23  # of an epoch of the digits, in batches of 64
TAGS = {"correlation", "correlation_worst", "variance_error", "variance_error_worst", "steps", "refused"}
pytestmark = pytest.mark.filterwarnings("ignore")  # of the trainers: on workers, devices, what they import


def test_scalars_are_the_mean_and_the_worst_site_the_fewest_steps_and_all_refusals() -> None:
    sites = Stats([SiteStats("a", 0.1, 0.5, 7, 1), SiteStats("b", 0.3, 0.25, 4, 2)])
    assert sites.scalars() == {
        "decorr/correlation": pytest.approx(0.2), "decorr/correlation_worst": 0.3,
        "decorr/variance_error": pytest.approx(0.375), "decorr/variance_error_worst": 0.5,
        "decorr/steps": 4.0, "decorr/refused": 3.0,
    }  # fmt: skip


def saved_network(folder: Path) -> nn.Module:
    network = train_lightning.cnn()
    network.load_state_dict(torch.load(folder / "plain.pt"), strict=True)
    return network


def saved_convnext(folder: Path) -> nn.Module:
    return ConvNextForImageClassification.from_pretrained(folder / "plain")


@pytest.mark.parametrize(
    ("name", "prefix", "load"),
    [
        ("lightning", "decorr/", saved_network),
        ("accelerate", "decorr/", saved_network),
        ("transformers", "train/decorr/", saved_convnext),
    ],
)
def test_an_example_logs_and_leaves_a_plain_model_as_accurate_as_it_says(
    name: str, prefix: str, load: Callable[[Path], nn.Module], tmp_path: Path
) -> None:
    command = [sys.executable, str(ROOT / f"examples/train_{name}.py"), "--epochs", "2", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    printed = float(re.findall(r"validation accuracy of the folded model: (\d\.\d+)", done.stdout)[0])
    logged = scalars(tmp_path)
    assert {tag.removeprefix(prefix) for tag in logged if tag.startswith(prefix)} == TAGS
    steps, worst = logged[f"{prefix}steps"], logged[f"{prefix}correlation_worst"]
    assert len(steps) >= 4
    assert 0 < steps[0] < steps[-1] <= 2 * STEPS
    assert all(0 < mean < most for mean, most in zip(logged[f"{prefix}correlation"], worst, strict=True))
    assert set(logged[f"{prefix}refused"]) == {0.0}
    assert accuracy(load(tmp_path)) == pytest.approx(printed, abs=1e-4)
    assert printed > 0.5


def scalars(folder: Path) -> dict[str, list[float]]:
    """Return what was logged to TensorBoard below a folder, by its tags."""
    (file,) = folder.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def accuracy(plain: nn.Module) -> float:
    """Return the accuracy on the images that the examples hold out."""
    images, labels = train_lightning.digits()[1]
    with torch.no_grad():
        out = plain.eval()(images)
    return float((getattr(out, "logits", out).argmax(1) == labels).float().mean())


class Losses(lightning.Callback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: dict[str, Tensor], *_: Any) -> None:
        self.found.append(outputs["loss"].item())


def fit(module: lightning.LightningModule, checkpoint: Path | None = None, **settings: Any) -> lightning.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(**quiet, enable_model_summary=False, **settings)
    loader = DataLoader(TensorDataset(*train_lightning.digits()[0]), batch_size=64)  # Lightning saves no random state
    trainer.fit(module, loader, ckpt_path=checkpoint)
    return trainer


def test_lightning_goes_on_from_its_checkpoint_with_the_same_losses(tmp_path: Path) -> None:
    whole, first, second = Losses(), Losses(), Losses()
    for epochs, losses in ((2, whole), (1, first)):
        torch.manual_seed(0)
        trainer = fit(train_lightning.Classifier(), max_epochs=epochs, callbacks=[losses])
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    fit(train_lightning.Classifier(), tmp_path / "stopped.ckpt", max_epochs=2, callbacks=[second])
    assert first.found + second.found == whole.found
    assert len(second.found) == STEPS


def prepared(**settings: Any) -> tuple[Accelerator, Any]:
    torch.manual_seed(0)
    AcceleratorState._reset_state(reset_partial_state=True)  # which a process has one of, with the first settings
    accelerator = Accelerator(cpu=True, **settings)
    return accelerator, train_accelerate.prepare(accelerator, train_accelerate.digits()[0])


def an_epoch(accelerator: Accelerator, of: Any) -> list[float]:
    """Train for an epoch; return the losses."""
    model, optimizer, loader = of
    losses = []
    for images, labels in loader:
        with accelerator.accumulate(model):
            loss = cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_accelerate_goes_on_from_its_state_with_the_same_losses(tmp_path: Path) -> None:
    accelerator, trained = prepared()
    an_epoch(accelerator, trained)
    accelerator.save_state(str(tmp_path))
    expected = an_epoch(accelerator, trained)
    accelerator, resumed = prepared()
    accelerator.load_state(str(tmp_path))
    assert an_epoch(accelerator, resumed) == expected


class StopAndSave(TrainerCallback):
    """Stops in the middle of an epoch."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = control.should_training_stop = state.global_step == 10


def train(folder: Path, resume: bool = False, callbacks: Any = (), **settings: Any) -> Trainer:
    torch.manual_seed(0)
    arguments = TrainingArguments(
        folder, logging_steps=1, per_device_train_batch_size=64, save_strategy="no", report_to="none", use_cpu=True,
        disable_tqdm=True, **({"max_steps": 30} | settings),
    )  # fmt: skip
    model, (training, _) = decorr_fx.transform(train_transformers.convnext()), train_transformers.digits()
    trainer = Trainer(model, arguments, train_dataset=training, callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged_losses(trainer: Trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_the_trainer_of_transformers_goes_on_from_its_checkpoint_with_the_same_losses(tmp_path: Path) -> None:
    whole = logged_losses(train(tmp_path))
    stopped = logged_losses(train(tmp_path, callbacks=[StopAndSave()]))
    resumed = logged_losses(train(tmp_path, resume=True))
    assert len(stopped) == 10
    assert resumed == whole
    assert len(set(whole)) == 30


def by_lightning(folder: Path) -> tuple[nn.Module, int]:
    module = train_lightning.Classifier()
    trainer = fit(module, max_epochs=1, precision="bf16-mixed", accumulate_grad_batches=2)
    return module.net, trainer.global_step


def by_accelerate(folder: Path) -> tuple[nn.Module, int]:
    accelerator, trained = prepared(mixed_precision="bf16", gradient_accumulation_steps=2)
    an_epoch(accelerator, trained)
    return accelerator.unwrap_model(trained[0]), (STEPS + 1) // 2


def by_transformers(folder: Path) -> tuple[nn.Module, int]:
    trainer = train(folder, max_steps=12, bf16=True, gradient_accumulation_steps=2)
    return trainer.model, trainer.state.global_step


@pytest.mark.parametrize("trained", [by_lightning, by_accelerate, by_transformers])
def test_R_moves_once_for_all_accumulated_batches_and_folds_after_mixed_precision(
    trained: Callable[[Path], tuple[nn.Module, int]], tmp_path: Path
) -> None:
    model, steps = trained(tmp_path)
    sites = decorr_fx.stats(model)
    assert {site.steps for site in sites} == {steps} == {(STEPS + 1) // 2}  # so far R moves at each
    assert sites.scalars()["decorr/refused"] == 0
    x = train_lightning.digits()[1][0]
    folded, expected = (m.eval()(x) for m in (decorr_fx.fold(model), model))
    torch.testing.assert_close(getattr(folded, "logits", folded), getattr(expected, "logits", expected))


class Root(nn.Module):
    """Calls a linear itself, so that Accelerate wraps a forward that is ours."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


@pytest.mark.parametrize("keep_wrapper", [True, False])
def test_a_root_that_is_a_layer_folds_and_keeps_R_after_mixed_precision(keep_wrapper: bool) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    transformed = decorr_fx.transform(Root())
    model, optimizer = accelerator.prepare(transformed, torch.optim.SGD(transformed.parameters(), lr=0.1))
    for _ in range(5):
        optimizer.zero_grad()
        accelerator.backward(model(3 * torch.randn(16, 4)).square().mean())
        optimizer.step()
    unwrapped = accelerator.unwrap_model(model, keep_fp32_wrapper=keep_wrapper)
    x = torch.randn(5, 4)
    expected = nn.functional.linear(x, unwrapped.weight)
    assert unwrapped.weight_decorr.steps == 5
    for found in (unwrapped, decorr_fx.fold(unwrapped)):
        torch.testing.assert_close(found(x), expected, rtol=0.02, atol=0.02 if keep_wrapper else 1e-6)


def join() -> None:
    """Tell the trainers of the process group that this process is in."""
    for name in ("", "LOCAL_"):
        os.environ |= {f"{name}RANK": str(dist.get_rank()), f"{name}WORLD_SIZE": str(dist.get_world_size())}


def ranks_of_lightning() -> None:
    join()
    module = train_lightning.Classifier()
    fit(module, max_epochs=1, devices=2, strategy="ddp", plugins=[TorchElasticEnvironment()], callbacks=[SameR()])
    assert decorr_fx.stats(module)[0].steps == STEPS // 2 + 1


def ranks_of_accelerate() -> None:
    join()
    accelerator, trained = prepared()
    assert accelerator.num_processes == 2
    an_epoch(accelerator, trained)
    check_same_on_all_ranks(trained[0])


class SameR(lightning.Callback):
    """Checks in each process, at the end."""

    def on_train_end(self, trainer: Any, module: lightning.LightningModule) -> None:
        check_same_on_all_ranks(module)


def check_same_on_all_ranks(model: nn.Module) -> None:
    assert dist.get_world_size() == 2
    assert all(site.steps > 10 for site in decorr_fx.stats(model))
    for key, value in model.state_dict().items():
        first = value.clone()
        dist.broadcast(first, 0)
        assert torch.equal(value, first), key


@pytest.mark.parametrize("check", [ranks_of_lightning, ranks_of_accelerate])
def test_two_ranks_of_a_trainer_have_the_same_R(check: Callable[[], None], tmp_path: Path) -> None:
    on_ranks(2, check, tmp_path)


def test_R_moves_in_processes_that_lightning_spawns() -> None:
    fit(train_lightning.Classifier(), max_epochs=1, devices=2, strategy="ddp_spawn", callbacks=[SameR()])
