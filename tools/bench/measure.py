"""Measuring: contenders take turns in one process, a few steps each, and every step is timed.

Steps are not all alike: R moves at one of `update_every` of them, and a peer may renew its preconditioner at every
second. What a step costs is the median over each kind of step, weighted by how often the kind comes; likewise the
quartiles.
"""

import statistics
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tools.bench.cases import Case
from tools.bench.methods import prepare, step_kinds
from tools.bench.models import make_batch
from tools.common.ranks import told_by_first, wrapped

PHASES = ("forward", "backward", "optimizer", "decorrelation")  # the last one is what happens around the optimizer
MARKS = 7  # points in time that are noted in a step
TURN = 4  # steps
WARM_UP = 1  # turns that are not counted


@dataclass(frozen=True)
class Spread:
    """The median of some numbers, and their quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarise the values."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def times(self, factor: float) -> "Spread":
        """Return the spread of the numbers times a factor."""
        return Spread(factor * self.median, factor * self.low, factor * self.high)

    @classmethod
    def weighted(cls, shares: Mapping[Hashable, float], values: Mapping[Hashable, Sequence[float]]) -> "Spread":
        """Return the mean over kinds, by their shares, of each kind's median and quartiles."""
        spreads = [(shares[kind], cls.of(of_kind)) for kind, of_kind in values.items()]
        total = sum(share for share, _ in spreads)
        return cls(*(sum(w * getattr(s, name) for w, s in spreads) / total for name in ("median", "low", "high")))


class Marks:
    """Points in time, on the device's own clock where it has one, so that measuring waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self.on_device = device.type == "cuda"
        self.points: list[float | torch.cuda.Event] = []

    def mark(self) -> None:
        """Note this moment."""
        if self.on_device:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.points.append(event)
        else:
            self.points.append(perf_counter())

    def milliseconds(self) -> list[float]:
        """Return the times between the points, after the device is done."""
        if self.on_device:
            torch.cuda.synchronize()
        return [self._between(a, b) for a, b in zip(self.points, self.points[1:], strict=False)]

    def _between(self, a: "float | torch.cuda.Event", b: "float | torch.cuda.Event") -> float:
        if isinstance(a, torch.cuda.Event):
            return float(a.elapsed_time(b))  # type: ignore[arg-type]
        return 1e3 * (b - a)  # type: ignore[operator]


@dataclass
class Contender:
    """One method, ready to train; `steps` holds the milliseconds of each phase by kind of step."""

    case: Case
    method: str
    steps: dict[Hashable, list[list[float]]] = field(default_factory=lambda: defaultdict(list))
    evaluations: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model, self.optimizer = prepare(self.case, self.method)
        self.kinds = step_kinds(self.method)
        running = wrapped(self.model)
        self.running: nn.Module = torch.compile(running) if self.case.compile else running  # type: ignore[assignment]
        self.device = torch.device(self.case.device)
        self.batch = make_batch(self.case)
        self.taken = 0
        self.marks = Marks(self.device)
        # the optimizer's own hooks are the innermost: around them are those of all optimizers, where R acts and moves
        self.optimizer.register_step_pre_hook(lambda *_: self.marks.mark())
        self.optimizer.register_step_post_hook(lambda *_: self.marks.mark())

    def train(self, steps: int = TURN, counts: bool = True) -> None:
        """Take some steps, and note the milliseconds of each phase."""
        self.running.train()
        self.marks = Marks(self.device)
        kinds = []
        for _ in range(steps):
            kinds.append(self.kinds.begin(self.model, self.taken))
            self.taken += 1
            self.marks.mark()
            loss = self._loss()
            self.marks.mark()
            loss.backward()  # type: ignore[no-untyped-call]
            self.marks.mark()
            self.optimizer.step()  # marks its own begin and end
            self.marks.mark()
            self.optimizer.zero_grad()
            self.marks.mark()
        times = self.marks.milliseconds()
        for i, kind in enumerate(kinds if counts else []):
            forward, backward, before, optimizer, after, zero_grad = times[i * MARKS : (i + 1) * MARKS - 1]
            self.steps[kind].append([forward, backward, optimizer + zero_grad, before + after])

    def step_spread(self, first: bool = False) -> Spread:
        """Return the milliseconds of a step, in a long training or in its first steps."""
        shares = self.kinds.first if first else self.kinds.shares
        return Spread.weighted(shares, {kind: [sum(s) for s in steps] for kind, steps in self.steps.items()})

    def phase_spread(self, phase: int) -> Spread:
        """Return the milliseconds of one phase of a step."""
        of_kind = {kind: [step[phase] for step in steps] for kind, steps in self.steps.items()}
        return Spread.weighted(self.kinds.shares, of_kind)

    @property
    def measured(self) -> int:
        """Steps that were timed."""
        return sum(map(len, self.steps.values()))

    def evaluate(self) -> float:
        """Return the milliseconds of one forward in eval mode, which the model is in already."""
        marks = Marks(self.device)
        with torch.no_grad():
            marks.mark()
            self._forward()
            marks.mark()
        return marks.milliseconds()[0]

    def _loss(self) -> Tensor:
        return F.cross_entropy(self._forward().float(), self.batch[1])

    def _forward(self) -> Tensor:
        enabled = self.case.dtype != "float32"
        with torch.autocast(self.device.type, getattr(torch, self.case.dtype) if enabled else None, enabled=enabled):
            out: Tensor = self.running(self.batch[0])
        return out


def race(contenders: Sequence[Contender], seconds: float, fewest: int = 3) -> None:
    """Let the contenders take turns for about so many seconds, and at least so many turns each."""
    for contender in contenders:
        for _ in range(WARM_UP):
            contender.train(counts=False)
    for number in _rounds(seconds, fewest):
        for contender in contenders if number % 2 else contenders[::-1]:
            contender.train()


def race_evaluations(contenders: Sequence[Contender], seconds: float, fewest: int = 5) -> None:
    """The same for forwards in eval mode."""
    for contender in contenders:
        contender.running.eval()
        for _ in range(WARM_UP):
            contender.evaluate()
    for number in _rounds(seconds, fewest):
        for contender in contenders if number % 2 else contenders[::-1]:
            contender.evaluations.append(contender.evaluate())


def _rounds(seconds: float, fewest: int) -> Iterator[int]:
    """Yield 0, 1, 2, ... for about so many seconds, and at least so many numbers; on all ranks the same."""
    start = perf_counter()
    for number in count():
        if told_by_first(lambda: number >= fewest and perf_counter() - start >= seconds):  # noqa: B023 - called here
            return
        yield number
