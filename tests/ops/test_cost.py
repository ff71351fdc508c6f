from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import drawn_R
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, bmm_flop

from decorr_fx import Crgd, Dbp, Power, Rule
from decorr_fx.ops.calls import layer_signature
from decorr_fx.ops.coordinates import gradients_to_z, moves_to_x
from decorr_fx.ops.cost import (
    EIGENVALUES,
    LARGEST_FULL,
    around_flops,
    choose_layouts,
    move_flops,
    own_flops,
    used_rank,
)
from decorr_fx.ops.layout import Layout
from decorr_fx.ops.low_rank import LowRank
from decorr_fx.ops.moment import losses
from decorr_fx.ops.rules.power import State, apply_step, update_moments
from decorr_fx.ops.rules.small_steps import step_factors


def plain_layout(layer: nn.Module) -> Layout:
    return layer_signature(layer).layout(getattr(layer, "groups", 1), layer.weight.shape)


@pytest.mark.parametrize(
    ("layer", "structure", "expected"),
    [
        (nn.Linear(64, 10), None, "full"),
        (nn.Linear(256, 10), None, "full"),
        (nn.Linear(768, 10), None, "block x3"),
        (nn.Conv2d(16, 16, 3), None, "full"),
        (nn.Conv2d(128, 16, 3), None, "kronecker"),
        (nn.Conv2d(2048, 16, 1), None, "block x8"),
        (nn.Conv2d(1, 16, 31), None, "full"),  # a pair over a single channel is one matrix over the taps
        (nn.Conv2d(32, 32, 31, groups=32), None, "full"),
        (nn.ConvTranspose2d(128, 16, 3), None, "kronecker"),
        (nn.Linear(25088, 10, device="meta"), None, "block x98"),
        (nn.Linear(25088, 10, device="meta"), "full", "full"),
        (nn.Conv2d(1024, 16, 3), "kronecker", "kronecker"),
        (nn.Linear(768, 10), "kronecker", "full"),
        (nn.Conv2d(64, 16, 3), "block", "block x4"),
        (nn.Conv2d(64, 16, 1), "block", "full"),
        (nn.Linear(1031, 4), "block", "full"),  # a prime: nothing but slivers would be equal blocks
    ],
)  # fmt: skip
@pytest.mark.parametrize("rule", [Dbp, Crgd])
def test_the_structure_is_chosen_as_the_docs_say(
    layer: nn.Module, structure: str | None, expected: str, rule: type[Dbp | Crgd]
) -> None:
    (layout,) = choose_layouts([plain_layout(layer)], rule(structure=structure))
    assert layout.structure == expected
    if layout.blocks > 1:
        assert max(layout.modes) <= LARGEST_FULL


@given(st.integers(1, 4000), st.integers(1, 300))
def test_R_of_low_rank_has_no_more_directions_than_features(features: int, rank: int) -> None:
    (layout,) = choose_layouts([Layout(1, 3, features)], Power(rank=rank))
    assert layout.rank == min(rank, features) and not layout.paired and layout.blocks == 1


def test_layers_that_share_an_input_have_one_structure() -> None:
    plain = [Layout(1, 5, 768), Layout(1, 20, 768, transposed=True)]
    for rule in (Power(), Dbp()):
        first, second = choose_layouts(plain, rule)
        assert first.factor_shapes == second.factor_shapes
        assert (first.d_out, second.d_out, second.transposed) == (5, 20, True)


@given(st.integers(1, 128), st.integers(1, 100_000), st.floats(0.001, 1.0))
def test_about_as_many_directions_are_used_as_the_budget_allows(rank: int, rows: int, cost_budget: float) -> None:
    used, layout = used_rank(rank, rows, cost_budget), Layout(1, 30, 200, rank=rank)
    fewest = min(4, rank)
    assert fewest <= used <= rank
    affordable = cost_budget * own_flops([layout], rows)
    assert used == rank or used.bit_count() == 1
    assert used == fewest or around_flops([layout], used) <= affordable * 2**0.5 * (1 + 1e-12)
    assert used == rank or around_flops([layout], 2 * used) > affordable * 2**0.5 * (1 - 1e-12)


@pytest.mark.parametrize(("rows", "used"), [(1, 4), (64, 4), (512, 16), (2000, 32)])
def test_few_rows_leave_few_directions_at_the_default_budget(rows: int, used: int) -> None:
    assert used_rank(Power().rank, rows, Power().cost_budget) == used


RULES = [Power(rank=5), Dbp(structure="full"), Dbp(structure="kronecker"), Dbp(structure="block")]
LAYERS = [nn.Linear(48, 40), nn.Conv1d(48, 40, 3), nn.Conv2d(12, 8, 3, groups=2), nn.ConvTranspose1d(48, 40, 3)]


def named(rule: Rule) -> str:
    return "rank" if isinstance(rule, Power) else rule.structure


def _product_in_place(rows: object, left: torch.Size, right: torch.Size, **options: object) -> int:
    """Count what torch's own counter leaves out."""
    return bmm_flop(left, right)


def flops_of(function: Callable[[], object]) -> int:
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: _product_in_place}) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("rule", RULES, ids=named)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("weights", [1, 2])
def test_the_products_around_a_step_take_the_flops_that_are_counted(layer: nn.Module, rule: Rule, weights: int) -> None:
    """Counted by torch, also of two weights that share R."""
    layouts = choose_layouts([plain_layout(layer)] * weights, rule)
    layout = layouts[0]

    def around() -> None:
        for _ in layouts:
            R, theta = drawn_R(layout, 0, torch.float32), layer.weight.detach().clone()
            gradients_to_z([torch.randn_like(theta)], R, layout)
            moves_to_x([theta], [torch.zeros_like(theta)], R, layout)

    assert flops_of(around) == around_flops(layouts, layout.rank)


@pytest.mark.parametrize("used", [1, 3])
def test_fewer_used_directions_take_fewer_flops(used: int) -> None:
    layout, theta = Layout(1, 40, 48, rank=5), torch.randn(40, 48)
    R = LowRank(drawn_R(layout, 0, torch.float32).U[:, -used:])

    def around() -> None:
        gradients_to_z([theta], R, layout)
        moves_to_x([theta], [torch.zeros_like(theta)], R, layout)

    assert flops_of(around) == around_flops([layout], used)


@pytest.mark.parametrize("positions", [4, 30])
@pytest.mark.parametrize("layer", [nn.Linear(48, 40), nn.Conv1d(48, 40, 3, padding=1), nn.Conv1d(48, 40, 1)])
def test_the_layers_own_flops_are_those_of_forward_and_backward(layer: nn.Module, positions: int) -> None:
    x = torch.randn(4, positions, 48) if isinstance(layer, nn.Linear) else torch.randn(4, 48, positions)
    own = flops_of(lambda: layer(x.clone().requires_grad_()).sum().backward())
    assert own == own_flops([plain_layout(layer)], 4 * positions)


@pytest.mark.parametrize("rows", [16, 200])
@pytest.mark.parametrize("rule", RULES, ids=named)
@pytest.mark.parametrize("groups", [1, 2])
def test_moving_R_takes_the_flops_that_are_counted(rule: Rule, rows: int, groups: int) -> None:
    """Torch counts products only: eigenvalues are left out on both sides."""
    (layout,) = choose_layouts([Layout(groups, 20, 32, 3)], rule)
    n = layout.slots(rows)
    x, count = torch.randn(layout.stacks, n, *layout.modes), torch.full((layout.stacks,), n)
    R, uncounted = drawn_R(layout, 0, torch.float32), 0
    if isinstance(rule, Power):
        ones = torch.ones(layout.stacks)
        state = State(R.U, torch.ones(R.U.shape[:2]), ones, ones)
        got = flops_of(
            lambda: apply_step(update_moments(state, ones, x, count, 0.1, layout.rank)[0], rule, layout.rank)
        )
        uncounted = layout.stacks * EIGENVALUES * min(n + layout.rank, layout.d) ** 3
    else:
        got = flops_of(lambda: losses(step_factors(R.factors, x, count, rule, 0.01)[1], 1))
    assert got == move_flops(layout, n) - uncounted
