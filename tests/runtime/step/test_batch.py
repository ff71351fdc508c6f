"""Weights around a step: on an accelerator those of one shape together, and each as if it were alone."""

import copy

import pytest
import torch
from torch import Tensor, nn

import decorr_fx
from decorr_fx import Crgd, Dbp, Power, Rule
from decorr_fx.ops import reference
from decorr_fx.runtime.site.state import Site, sites_of
from decorr_fx.runtime.step import batch
from decorr_fx.runtime.step.batch import after_step, before_step, grouped


class Three(nn.Module):
    """Two layers of equal shape, and one of another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv1d(6, 6, 3, groups=2), nn.Conv1d(6, 6, 3, groups=2), nn.Conv1d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).tanh()).tanh())


RULES = [
    Power(update_every=1), Power(update_every=1, rank=3, gain=0.0), Dbp(update_every=1, structure="full"),
    Dbp(update_every=1, structure="kronecker"), Dbp(update_every=1, preserve_function=False), Crgd(update_every=1),
]  # fmt: skip


def moved(rule: Rule, model: nn.Module | None = None) -> nn.Module:
    """Return a model whose R has moved, with new gradients."""
    model = decorr_fx.transform((model or Three()).double(), rule)
    shape = (4, 6, 20)
    for _ in range(2):
        model.zero_grad()
        model(torch.randn(shape, dtype=torch.float64)).square().mean().backward()
        with decorr_fx.stepping(model):
            pass
    model.zero_grad()
    model(torch.randn(shape, dtype=torch.float64)).square().mean().backward()
    return model


def before(model: nn.Module) -> list[batch.Batch]:
    return before_step(list(sites_of(model)), frozenset(map(id, model.parameters())))


def step(model: nn.Module) -> int:
    """Let weights move by their gradients and something else; return in how many products."""
    batches = before(model)
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad + 0.01
    after_step(batches)
    return len(batches)


@pytest.mark.parametrize("rule", RULES)
def test_weights_together_as_one_by_one(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    alone = moved(rule)
    together = copy.deepcopy(alone)
    for one, other in zip(alone.parameters(), together.parameters(), strict=True):
        other.grad = one.grad.clone()
    assert step(alone) == 3
    monkeypatch.setattr(batch, "ALONE", ())  # as on an accelerator
    assert step(together) == 2
    for name, p in alone.named_parameters():
        torch.testing.assert_close(together.get_parameter(name), p, msg=name)
        torch.testing.assert_close(together.get_parameter(name).grad, p.grad, msg=name)


def test_rules_are_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decorr_fx.transform(Three(), Power(), overrides={"b": Power(gain=0.0)})
    for site in sites_of(model):
        site.is_identity = False
    model(torch.randn(4, 6, 20)).square().mean().backward()
    monkeypatch.setattr(batch, "ALONE", ())
    assert len(before(model)) == 3


@pytest.mark.parametrize("rule", RULES)
def test_gradients_and_moves_are_mapped_by_the_dense_matrix(rule: Rule) -> None:
    model = moved(rule)
    sites: list[Site] = list(sites_of(model))
    olds = [(p, p.detach().clone(), p.grad.clone()) for p in (model.a.weight, model.b.weight, model.c.weight)]
    step(model)
    for site, (p, old, gradient) in zip(sites, olds, strict=True):
        groups = site.spec.layout.groups
        parts = [part.flatten(1).chunk(groups) for part in (old, gradient, p.detach())]
        gains = site.gain if isinstance(rule, Power) else torch.ones(groups)
        for R, gain, before, g, after in zip(site.dense(), gains, *parts, strict=True):
            mapped = reference.gradient_to_z(g, R) / gain
            expected = reference.move_to_x(before, before - 0.1 * mapped - 0.01, R)
            torch.testing.assert_close(after, expected)


def test_nothing_is_done_for_sites_whose_R_has_never_moved() -> None:
    model = decorr_fx.transform(Three())
    model(torch.randn(4, 6, 20)).square().mean().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    assert before(model) == []
    assert all(map(torch.equal, gradients, (p.grad for p in model.parameters())))


def test_nothing_is_done_without_a_gradient_or_for_frozen_weights() -> None:
    model = moved(Power(update_every=1))
    model.a.weight.grad = None
    model.b.requires_grad_(False)
    gradient = model.b.weight.grad.clone()
    (only,) = before(model)
    assert only.weights[0].data_ptr() == model.c.weight.data_ptr()
    assert torch.equal(model.b.weight.grad, gradient)


def test_a_sparse_gradient_is_left_alone() -> None:
    model = moved(Power(update_every=1))
    model.a.weight.grad = model.a.weight.grad.to_sparse()
    assert len(before(model)) == 2


def test_a_gradient_that_was_mapped_is_not_mapped_again_until_it_changes() -> None:
    model = moved(Power(update_every=1))
    before(model)
    mapped = [p.grad.clone() for p in model.parameters()]
    assert len(before(model)) == 3
    assert all(map(torch.equal, mapped, (p.grad for p in model.parameters())))
    for p in model.parameters():
        p.grad.zero_().add_(1.0)
    before(model)
    assert not torch.equal(model.a.weight.grad, torch.ones_like(model.a.weight))


def test_a_gradient_of_the_first_step_stays_that_of_W_when_R_has_moved() -> None:
    model = decorr_fx.transform(Three(), Power(update_every=1))
    model(torch.randn(4, 6, 20)).square().mean().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    for _ in range(2):
        with decorr_fx.stepping(model):
            pass
    assert all(site.steps == 1 for site in sites_of(model))
    assert all(map(torch.equal, gradients, (p.grad for p in model.parameters())))


def test_copies_of_weights_are_kept_while_the_optimizer_steps() -> None:
    model = moved(Power(update_every=1))
    first = before(model)[0]
    assert first.olds[0].data_ptr() != model.a.weight.data_ptr()
    assert torch.equal(first.olds[0], model.a.weight)


def test_items_are_grouped_in_their_order() -> None:
    assert grouped([3, 1, 4, 1, 5, 9, 2, 6], lambda n: n % 2) == [[3, 1, 1, 5, 9], [4, 2, 6]]
    assert grouped([], id) == []
