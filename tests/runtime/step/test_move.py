"""Sites of equal shape step in one batch, and each as if it were alone; weights stand still, or W does."""

import copy

import pytest
import torch
from torch import Tensor, nn

import decorr_fx
from decorr_fx import Crgd, Dbp, Power, Rule
from decorr_fx.ops import reference
from decorr_fx.runtime.site.state import Site, sites_of
from decorr_fx.runtime.step.batch import grouped
from decorr_fx.runtime.step.move import Move, apply_updates, move, shape_of, update_moments


class Three(nn.Module):
    """Two layers of equal shape, and one of another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv1d(6, 6, 3), nn.Conv1d(6, 6, 3), nn.Conv1d(6, 4, 3)

    def forward(self, x: Tensor, with_b: bool = True) -> Tensor:
        x = self.a(x).tanh()
        return self.c(self.b(x).tanh() if with_b else x[..., 2:])


RULES = [
    Power(), Power(rank=3), Power(gain=0.0), Power(max_samples=5), Power(power=0.0), Dbp(),
    Dbp(structure="kronecker"), Dbp(structure="block"), Dbp(preserve_function=False), Dbp(sample_fraction=0.3), Crgd(),
    Crgd(structure="kronecker"), Crgd(max_samples=5),
]  # fmt: skip


def move_of(site: Site, rate: float = 0.05) -> Move:
    return Move(site, site.recorded(), rate)


def groups_of(model: nn.Module) -> list[list[Move]]:
    return grouped([move_of(site) for site in sites_of(model)], shape_of)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("with_b", [True, False])
def test_a_batch_of_sites_steps_as_one_by_one(rule: Rule, with_b: bool) -> None:
    together = decorr_fx.transform(Three(), rule)
    together(torch.randn(4, 6, 20), with_b)
    alone = copy.deepcopy(together)
    groups = groups_of(together)
    assert [[one.site.spec.fqn for one in group] for group in groups] == [["a", "b"], ["c"]]
    for group in groups:
        move(group)
    for site in sites_of(alone):
        move([move_of(site)])
    for (key, got), expected in zip(together.state_dict().items(), alone.state_dict().values(), strict=True):
        torch.testing.assert_close(got, expected, msg=key)
    assert [site.steps for site in sites_of(together)] == [1, int(with_b), 1]


@pytest.mark.parametrize("rule", RULES[:5])
def test_the_two_parts_of_a_step_are_the_step(rule: Rule) -> None:
    whole = decorr_fx.transform(Three(), rule)
    whole(torch.randn(4, 6, 20))
    parts = copy.deepcopy(whole)
    before = copy.deepcopy(parts.state_dict())
    for group in groups_of(whole):
        move(group)
    updates = [one for group in groups_of(parts) for one in update_moments(group)]
    assert all(torch.equal(value, before[key]) for key, value in parts.state_dict().items())  # nothing has moved
    for of_shape in grouped(updates, shape_of):
        apply_updates(of_shape)
    for (key, got), expected in zip(parts.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(got, expected), key


@pytest.mark.parametrize("rule", RULES)
def test_weights_stand_still_but_for_the_published_rule(rule: Rule) -> None:
    model = decorr_fx.transform(Three().double(), rule)
    x = torch.randn(4, 6, 20, dtype=torch.float64)
    for _ in range(2):
        before = [p.detach().clone() for p in model.parameters()]
        olds = decorr_fx.matrices(model)
        model(x)
        for group in groups_of(model):
            move(group)
        if rule.preserve_function:
            assert all(map(torch.equal, before, model.parameters()))
            continue
        for name, R in decorr_fx.matrices(model).items():
            layer = model.get_submodule(name)
            theta = dict(zip(("a", "b", "c"), before[::2], strict=True))[name].flatten(1)
            torch.testing.assert_close(layer.weight.flatten(1), reference.follow(theta, olds[name][0], R[0]))
            assert not torch.equal(layer.weight.flatten(1), theta)


@pytest.mark.parametrize("rule", RULES)
def test_a_site_that_is_refused_does_not_hold_up_the_others(rule: Rule) -> None:
    model = decorr_fx.transform(Three(), rule)
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(4, 6, 20))
    model.b.weight_decorr.rows[0, 0] = torch.nan
    for group in groups_of(model):
        move(group)
    stats = {s.fqn: (s.steps, s.refused) for s in decorr_fx.stats(model)}
    assert stats == {"a": (1, 0), "b": (0, 1), "c": (1, 0)}
    R_of_b = [key for key in before if key.startswith("b.") and "refused" not in key and "extra" not in key]
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in R_of_b)


@pytest.mark.parametrize("other", [Power(damping=0.1), Power(power=0.3), Dbp()])
def test_other_settings_are_another_group(other: Rule) -> None:
    model = decorr_fx.transform(Three(), overrides={"b": other})
    assert [[one.site.spec.fqn for one in group] for group in groups_of(model)] == [["a"], ["b"], ["c"]]


def test_another_rate_or_used_rank_is_another_group() -> None:
    model = decorr_fx.transform(Three(), Dbp())
    rates = {"a": 0.1, "b": 0.2, "c": 0.1}
    moves = [move_of(site, rates[site.spec.fqn]) for site in sites_of(model)]
    assert [len(group) for group in grouped(moves, shape_of)] == [1, 1, 1]
    model = decorr_fx.transform(Three())
    model.b.weight_decorr.used = 2
    assert [len(group) for group in groups_of(model)] == [1, 1, 1]


def test_crgd_keeps_a_running_mean_of_rows_that_are_in_use() -> None:
    layer = decorr_fx.transform(nn.Linear(4, 3), Crgd(max_samples=50))
    x = torch.randn(20, 4) + 3
    layer(x)
    move([move_of(layer.weight_decorr)])
    torch.testing.assert_close(layer.weight_decorr.mean[0], 0.1 * x.mean(0))
