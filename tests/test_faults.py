"""What long runs meet: bad batches, exploding steps, copies that come and go. R, W and the last checkpoint survive."""

import copy
import io
import random
from collections.abc import Callable

import psutil
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import decorr_fx
from decorr_fx import Crgd, Dbp, Power, Rule
from decorr_fx.runtime.site.state import sites_of

RULES = [
    Power(update_every=2),
    Power(update_every=2, gain=0.0),
    Dbp(structure="full", decor_lr=0.1, update_every=2),
    Crgd(structure="kronecker", decor_lr=0.01, update_every=2),
]
rules = pytest.mark.parametrize("rule", RULES, ids=["Power", "Power with gain", "Dbp", "Crgd"])
Change = Callable[[Tensor], Tensor]

BAD: dict[str, Change] = {
    "NaN": lambda x: x.masked_fill(torch.rand_like(x) < 0.01, torch.nan),
    "infinity": lambda x: x.masked_fill(torch.rand_like(x) < 0.01, torch.inf),
    "out of range": lambda x: 1e38 * x,
}
ODD: dict[str, Change] = {
    "all zero": torch.zeros_like,
    "one sample": lambda x: x[:1],
    "constant channels": lambda x: torch.ones_like(x),
    "a constant channel": lambda x: torch.cat([torch.ones_like(x[:, :1]), x[:, 1:]], 1),
    "tiny": lambda x: 1e-30 * x,
    "a larger picture": lambda x: F.pad(x, (2, 3, 1, 0)),
    "the same sample": lambda x: x[:1].expand_as(x),
}


def as_it_is(x: Tensor) -> Tensor:
    return x


class Run:
    """A small net that learns which half of a picture is brighter; no step is taken where the loss is not finite."""

    def __init__(self, rule: Rule, seed: int = 0) -> None:
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 2),
        )  # fmt: skip
        self.model = decorr_fx.transform(net, rule)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)

    def step(self, change: Change = as_it_is) -> float:
        """Take a step on a new batch; return the loss."""
        x = torch.randn(8, 2, 6, 6)
        y = (x[..., :3].sum((1, 2, 3)) > x[..., 3:].sum((1, 2, 3))).long()
        x = change(x)
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(x), y[: len(x)])
        if loss.isfinite():
            loss.backward()
            self.optimizer.step()
        return float(loss.detach())

    def loss(self) -> float:
        """Return the mean loss of some steps that are good."""
        return sum(self.step() for _ in range(20)) / 20

    def save(self) -> bytes:
        """Return a checkpoint."""
        file = io.BytesIO()
        torch.save([self.model.state_dict(), self.optimizer.state_dict()], file)
        return file.getvalue()

    def load(self, checkpoint: bytes) -> None:
        model, optimizer = torch.load(io.BytesIO(checkpoint), weights_only=True)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)

    @property
    def refused(self) -> int:
        return sum(of_site.refused for of_site in decorr_fx.stats(self.model))

    def check_finite(self) -> None:
        for name, value in self.model.state_dict().items():
            assert value.isfinite().all(), name
        assert len(list(sites_of(self.model))) == 3


@rules
@pytest.mark.parametrize("fault", BAD)
def test_a_batch_that_is_not_finite_moves_nothing_and_training_goes_on(fault: str, rule: Rule) -> None:
    run = Run(rule)
    first = run.loss()
    before = copy.deepcopy(run.model.state_dict())
    assert not torch.tensor(run.step(BAD[fault])).isfinite()
    assert all(torch.equal(value, before[key]) for key, value in run.model.state_dict().items())
    for _ in range(100):
        run.step()
    run.check_finite()
    assert run.refused > 0  # the rows of the bad batch came along to the next step
    assert run.loss() < 0.9 * first


@rules
@pytest.mark.parametrize("fault", ODD)
def test_an_odd_batch_is_a_batch(fault: str, rule: Rule) -> None:
    run = Run(rule)
    first = run.loss()
    for _ in range(10):
        assert torch.tensor(run.step(ODD[fault])).isfinite()
    run.check_finite()
    assert run.loss() < 2 * first
    assert run.refused == 0


@rules
def test_an_exploding_learning_rate_leaves_R_finite_and_the_last_checkpoint_brings_all_back(
    rule: Rule,
) -> None:
    run = Run(rule)
    run.loss()
    saved = run.save()
    torch.manual_seed(1)
    expected = [run.step() for _ in range(5)]
    run.optimizer.param_groups[0]["lr"] = 1e25
    for _ in range(5):
        run.step()
    for site in sites_of(run.model):
        assert all(value.isfinite().all() for value in site.state_dict().values())
    run.load(saved)
    torch.manual_seed(1)
    assert [run.step() for _ in range(5)] == expected


def test_twenty_thousand_steps_with_random_faults_end_finite_and_take_no_more_memory() -> None:
    run, chance = Run(Power()), random.Random(0)
    process, faults = psutil.Process(), [*BAD.values(), *ODD.values()]
    first, good, refused, early = run.loss(), run.save(), 0, 0
    for step in range(20_000):
        fault = chance.choice(faults) if chance.random() < 0.05 else None
        loss = run.step(fault or as_it_is)
        if fault is None and not loss < 100:
            refused += run.refused
            run.load(good)
        elif step % 500 == 0 and loss < first:
            good = run.save()
        elif chance.random() < 0.001:
            run.optimizer.param_groups[0]["lr"] = 1e6  # until the loss shows it
        if step == 4_000:
            early = process.memory_info().rss
    assert process.memory_info().rss - early < 8 * 2**20
    run.load(good)
    run.check_finite()
    assert run.loss() < first / 2
    assert refused > 100
