"""Sites of equal shape step in one batch, and each as if it were alone."""

import copy

import pytest
import torch
from torch import nn

import decorr_fx
from decorr_fx import DecorrConfig
from decorr_fx.runtime.site.state import Site, sites_of
from decorr_fx.runtime.step.move import Move, group_by_shape, move


class Three(nn.Module):
    """Two layers of equal shape, and one of another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv1d(6, 6, 3), nn.Conv1d(6, 6, 3), nn.Conv1d(6, 4, 3)

    def forward(self, x: torch.Tensor, with_b: bool = True) -> torch.Tensor:
        x = self.a(x).tanh()
        return self.c(self.b(x).tanh() if with_b else x[..., 2:])


CONFIGS = [
    DecorrConfig(), DecorrConfig(rank=3, center=True), DecorrConfig(rule="dbp"),
    DecorrConfig(rule="dbp", structure="kronecker"), DecorrConfig(rule="dbp", structure="block", max_dim=9),
    DecorrConfig(rule="crgd", center=True), DecorrConfig(max_samples=5), DecorrConfig(preserve_function=False),
]  # fmt: skip


def move_of(site: Site) -> Move:
    return Move(site, site.recorded(), 0.05)


def groups_of(model: nn.Module) -> list[list[Move]]:
    return list(group_by_shape(move_of(site) for site in sites_of(model)))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("with_b", [True, False])
def test_a_batch_of_sites_steps_as_one_by_one(config: DecorrConfig, with_b: bool) -> None:
    together = decorr_fx.transform(Three(), config)
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


def test_a_site_that_is_refused_does_not_hold_up_the_others() -> None:
    model = decorr_fx.transform(Three())
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(4, 6, 20))
    model.b.weight_decorr.rows[0, 0] = torch.nan
    for group in groups_of(model):
        move(group)
    stats = {s.fqn: (s.steps, s.refused) for s in decorr_fx.stats(model)}
    assert stats == {"a": (1, 0), "b": (0, 1), "c": (1, 0)}
    assert torch.equal(model.b.weight, before["b.weight"])
    assert not torch.equal(model.a.weight, before["a.weight"])


def test_other_settings_are_another_group() -> None:
    model = decorr_fx.transform(Three(), overrides={"b": DecorrConfig(kappa=0.1)})
    assert [[one.site.spec.fqn for one in group] for group in groups_of(model)] == [["a"], ["b"], ["c"]]
