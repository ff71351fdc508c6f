"""The race: several methods train side by side, from the same initial weights and on the same batches.

Fair by construction: the contenders take turns every few steps, so that whatever else the machine does hits all of
them; each turn starts from the same random seed, so that dropout masks are as equal as they can be; the clock runs only
while a contender takes training steps, and it waits for the device; plain backpropagation runs the plain model.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import chain, cycle, islice
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR

from tools.common.optimizers import OPTIMIZERS
from tools.common.ranks import rank, told_by_first, wrapped
from tools.train.data import Batch, Data
from tools.train.models import logits_of
from tools.train.settings import Settings

TURN = 8  # steps that a contender takes before the next one's turn
EVALUATION_BATCH = 512


@dataclass(frozen=True)
class Score:
    """Mean cross-entropy, and the part of the images that was classified correctly."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class Evaluation:
    """How a method stood after `step` steps and `seconds` of training; `train_loss` is the mean since the last time."""

    method: str
    step: int
    epoch: float
    seconds: float
    train_loss: float | None
    val_loss: float
    val_accuracy: float


class Contender:
    """One method: its model, its optimizer, its clock, and what was measured of it."""

    def __init__(self, method: str, model: nn.Module, settings: Settings, steps: int) -> None:
        self.method = method
        self.model = model
        self.device = settings.torch_device()
        self.history: list[Evaluation] = []
        self.seconds = 0.0
        self.step = 0
        running = wrapped(model)
        self._running = cast(nn.Module, torch.compile(running)) if settings.compile else running
        self._optimizer = _make_optimizer(settings, model)
        self._schedule = LinearLR(self._optimizer, start_factor=1.0, end_factor=0.0, total_iters=steps)
        self._amp, self._seed = settings.amp, settings.seed
        self._losses: list[Tensor] = []

    def warm_up(self, batch: Batch) -> None:
        """Run one forward and backward before the clock starts, which compiles the model; nothing of it is kept."""
        before = deepcopy(self.model.state_dict())
        self._running.train()
        self._loss(*batch).backward()  # type: ignore[no-untyped-call]
        self._optimizer.zero_grad()
        self.model.load_state_dict(before)  # the rows recorded for R are dropped by this, too

    def train(self, batches: Sequence[Batch]) -> None:
        """Take one step on each batch, against the clock."""
        torch.manual_seed(1_000_003 * self._seed + self.step + 7_919 * rank())
        self._running.train()
        _wait_for(self.device)
        start = perf_counter()
        for images, labels in batches:
            loss = self._loss(images, labels)
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            self._schedule.step()
            self._losses.append(loss.detach())
        _wait_for(self.device)
        self.seconds += perf_counter() - start
        self.step += len(batches)

    def evaluate(self, batches: Iterable[Batch], steps_per_epoch: int) -> Evaluation:
        """Measure the model on the validation batches and remember it; the clock stands still."""
        score = told_by_first(lambda: score_of(self.model, batches))
        train_loss = float(torch.stack(self._losses).mean()) if self._losses else None
        self._losses.clear()
        epoch = self.step / steps_per_epoch
        self.history.append(
            Evaluation(self.method, self.step, epoch, self.seconds, train_loss, score.loss, score.accuracy)
        )
        return self.history[-1]

    def state_dict(self) -> dict[str, Any]:
        """Return what it needs to go on from an evaluation."""
        state = {name: part.state_dict() for name, part in self._pieces().items()}
        return {**state, "step": self.step, "seconds": self.seconds, "history": [asdict(e) for e in self.history]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Be what `state_dict` was returned of."""
        for name, part in self._pieces().items():
            part.load_state_dict(state[name])
        self.step, self.seconds = state["step"], state["seconds"]
        self.history = [Evaluation(**evaluation) for evaluation in state["history"]]

    def _pieces(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self._optimizer, "schedule": self._schedule}

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._amp):
            logits = logits_of(self._running(images))
        return F.cross_entropy(logits.float(), labels)


def race(contenders: Sequence[Contender], data: Data, settings: Settings) -> Iterator[list[Evaluation]]:
    """Train all contenders on from where they stand; yield an evaluation of each, the first before the first step."""
    per_epoch, done = data.steps_per_epoch(settings.batch_size), contenders[0].step
    total, device = settings.epochs * per_epoch, contenders[0].device
    stream = islice(data.training_batches(settings.batch_size, settings.seed, device), done, None)
    order = cycle((contenders, contenders[::-1]))  # nobody always comes first
    intervals = _parts(total - done, max(1, total // settings.evaluations))
    for interval in intervals if contenders[0].history else chain([0], intervals):
        for turn in _parts(interval, TURN):
            batches = list(islice(stream, turn))
            for contender in next(order):
                contender.train(batches)
        yield [c.evaluate(data.batches("validation", EVALUATION_BATCH, device), per_epoch) for c in contenders]


def score_of(model: nn.Module, batches: Iterable[Batch]) -> Score:
    """Return the score of the model in eval mode, without autocast."""
    model.eval()
    sums, count = torch.zeros(2, dtype=torch.float64), 0
    with torch.no_grad():
        for images, labels in batches:
            logits = model(images)
            hits = (logits.argmax(1) == labels).sum()
            sums += torch.stack([F.cross_entropy(logits, labels, reduction="sum"), hits]).cpu()
            count += labels.numel()
    loss, accuracy = (sums / count).tolist()
    return Score(loss, accuracy)


def _parts(total: int, most: int) -> Iterator[int]:
    """Yield numbers of at most `most` that add up to `total`."""
    return (min(most, total - done) for done in range(0, total, most))


def _make_optimizer(settings: Settings, model: nn.Module) -> Optimizer:
    options = {"momentum": 0.9} if settings.optimizer == "sgd" else {}
    if settings.weight_decay is not None:
        options["weight_decay"] = settings.weight_decay
    return OPTIMIZERS[settings.optimizer](model.parameters(), lr=settings.lr, **options)


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
