"""One run: a network of one seed is trained, pruned by every method at every budget, and trained on at one of them."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tools.prune.methods import Pruned, Task, macs, prune_all, with_new_statistics
from tools.prune.training import TUNING_RATE, accuracy, calibration, load, train, trained
from tools.train.data import Data


@dataclass(frozen=True)
class Run:
    """What decides a run.

    Attributes:
        net: which network.
        seed: of its weights, of the batches, and of what is held out.
        data: options of tools.train that name the data.
        epochs: that it is trained for.
        keep: budgets, as parts of its multiply-adds.
        tuned: the budget at which the results are trained on for an epoch.
        batches: of 128 training images that the methods may look at.
    """

    net: str
    seed: int
    data: tuple[str, ...]
    epochs: int
    keep: tuple[float, ...]
    tuned: float
    batches: int

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Job:
    """A run, and the folder in which trained networks are kept."""

    run: Run
    folder: Path


def weights_file(job: Job) -> Path:
    """Return where the trained network is kept."""
    return job.folder / f"{job.run.net}-{job.run.seed}-{job.run.epochs}.pt"


def perform(job: Job) -> dict[str, Any]:
    """Train, or load what was trained, and prune.

    Returns:
        `run`; `whole`: accuracy on the test images, multiply-adds and parameters of the trained network; `pruned`: for
        each method and budget the same, with `new_statistics`, the accuracy after BatchNorm statistics are estimated
        anew, and `fine_tuned`, that after an epoch more, where it was trained on. Which scope of a method of
        torch-pruning is trained on is chosen by the validation images.
    """
    run = job.run
    data = load(run.data, run.seed)
    model = trained(run.net, data, run.seed, run.epochs, weights_file(job))
    task = Task(model, calibration(data, run.seed, run.batches))
    found = [row for keep in run.keep for row in _at_budget(task, data, run, keep)]
    return {
        "run": run.as_json(),
        "whole": _measured(model, task, data),
        "pruned": found,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _at_budget(task: Task, data: Data, run: Run, keep: float) -> Iterator[dict[str, Any]]:
    pruned = list(prune_all(task, keep))
    best = _best_scopes(pruned, task, data) if keep == run.tuned else []
    for one in pruned:
        tuned = None
        if one in best:
            tuned = accuracy(train(deepcopy(one.model), data, run.seed, 1, TUNING_RATE), data, "test")
        yield {
            "method": one.method,
            "scope": one.scope,
            "keep": keep,
            **_measured(one.model, task, data),
            "new_statistics": accuracy(with_new_statistics(one.model, task.images), data, "test"),
            "fine_tuned": tuned,
        }


def _best_scopes(pruned: Sequence[Pruned], task: Task, data: Data) -> list[Pruned]:
    """Return of each method the network that classifies most validation images, with new statistics."""
    scores = [accuracy(with_new_statistics(one.model, task.images), data, "validation") for one in pruned]
    by_method: dict[str, tuple[float, Pruned]] = {}
    for score, one in zip(scores, pruned, strict=True):
        if one.method not in by_method or score > by_method[one.method][0]:
            by_method[one.method] = (score, one)
    return [one for _, one in by_method.values()]


def _measured(model: nn.Module, task: Task, data: Data) -> dict[str, Any]:
    return {
        "accuracy": accuracy(model, data, "test"),
        "macs": macs(model, task.example),
        "params": sum(p.numel() for p in model.parameters()),
    }
