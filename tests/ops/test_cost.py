from dataclasses import replace
from math import inf

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import decorr_fx
from decorr_fx import DecorrConfig
from decorr_fx.ops.cost import (
    EIGENVALUES,
    MEMORY_BOUND,
    NARROWEST,
    Work,
    apply_flops,
    choose_layouts,
    extra_flops,
    move_flops,
    own_flops,
    share_of_budget,
    waiting_flops,
)
from decorr_fx.ops.layout import Layout
from decorr_fx.runtime.site.state import sites_of
from decorr_fx.runtime.step.move import Move, move


def plain_layout(layer: nn.Module) -> Layout:
    shape, groups = layer.weight.shape, getattr(layer, "groups", 1)
    return Layout(groups, shape[0] // groups, shape[1], shape[2:].numel())


@pytest.mark.parametrize(
    ("layer", "structure", "max_dim", "expected"),
    [
        (nn.Linear(64, 10), "auto", 512, "full"),
        (nn.Linear(768, 10), "auto", 512, "block x2"),
        (nn.Conv2d(16, 16, 3), "auto", 512, "full"),
        (nn.Conv2d(128, 16, 3), "auto", 512, "kronecker"),
        (nn.Conv2d(1024, 16, 3), "auto", 512, "kronecker x2"),
        (nn.Conv2d(32, 32, 31, groups=32), "auto", 512, "full"),
        (nn.Conv2d(2048, 16, 1), "auto", 512, "block x4"),
        (nn.Linear(25088, 10, device="meta"), "auto", 512, "block x49"),
        (nn.Linear(25088, 10, device="meta"), "full", 512, "full"),
        (nn.Conv2d(1024, 16, 3), "kronecker", 512, "kronecker"),
        (nn.Conv2d(1024, 16, 3), "channels", 512, "channels"),
        (nn.Conv2d(64, 16, 3), "block", 90, "block x8"),
        (nn.Linear(1031, 4), "auto", 256, "full"),  # a prime: nothing but slivers would be equal blocks
    ],
)  # fmt: skip
def test_the_structure_is_chosen_as_the_docs_say(layer: nn.Module, structure: str, max_dim: int, expected: str) -> None:
    plain = plain_layout(layer)
    config = DecorrConfig(rule="dbp", structure=structure, max_dim=max_dim)
    (layout,) = choose_layouts([plain], config, Work.unknown(plain), affordable=inf)
    assert layout.structure == expected
    if structure == "auto" and expected != "full":
        assert max(layout.modes) <= max_dim


@pytest.mark.parametrize("rows", [128, 512, 4096, 100_000])
@pytest.mark.parametrize("layer", [nn.Linear(768, 768), nn.Conv2d(512, 512, 3), nn.Conv2d(64, 64, 3)])
def test_auto_is_the_richest_within_the_budget(layer: nn.Module, rows: int) -> None:
    plain = plain_layout(layer)
    work = Work(rows, rows * plain.channels)
    affordable, dbp = 0.05 * own_flops([plain], work), DecorrConfig(rule="dbp")
    (layout,) = choose_layouts([plain], dbp, work, affordable)
    width = layout.channels // layout.blocks
    assert extra_flops([layout], work, dbp) <= affordable or width == NARROWEST
    (richer,) = choose_layouts([plain], replace(dbp, max_dim=2 * width), work, affordable=inf)
    assert width == 256 or richer == layout or extra_flops([richer], work, dbp) > affordable


def test_a_factor_over_taps_waits_for_memory_and_is_left_out_where_rows_are_few() -> None:
    plain, dbp = plain_layout(nn.Conv2d(512, 512, 3)), DecorrConfig(rule="dbp")
    chosen = {}
    for rows in (512, 50_000):
        work = Work(rows, rows * plain.channels)
        (chosen[rows],) = choose_layouts([plain], dbp, work, 0.05 * own_flops([plain], work))
    assert not chosen[512].mixes_taps and chosen[512].structure.startswith("channels")
    assert chosen[50_000].structure == "kronecker x2"
    assert waiting_flops([chosen[50_000]]) == 4 * 512 * 512 * 9 * (MEMORY_BOUND - 9)
    assert waiting_flops([chosen[512]]) == waiting_flops([plain]) == 0


def test_the_shares_add_up_to_the_budget_and_a_small_layer_is_not_starved() -> None:
    own = [1000, 10, 500]
    shares = [share_of_budget(own, i, 0.05) for i in range(3)]
    assert sum(shares) == pytest.approx(0.05 * sum(own))
    assert shares[1] > 0.5 * own[1]


SHAPES = [
    DecorrConfig(rank=5),
    *(DecorrConfig(rule="dbp", structure=s, max_dim=24) for s in ("full", "kronecker", "channels", "block")),
]


def shape_of(config: DecorrConfig) -> str:
    return config.structure if config.rule == "dbp" else "rank"


@pytest.mark.parametrize("positions", [1, 4, 30])
@pytest.mark.parametrize("config", SHAPES, ids=shape_of)
@pytest.mark.parametrize("layer", [nn.Linear(48, 40), nn.Conv1d(48, 40, 3, padding=1), nn.Conv1d(48, 40, 1)])
def test_applying_R_takes_the_flops_that_are_counted(layer: nn.Module, config: DecorrConfig, positions: int) -> None:
    """Counted by torch over forward and backward, against the plain layer."""
    batch = 4
    x = torch.randn(batch, positions, 48) if isinstance(layer, nn.Linear) else torch.randn(batch, 48, positions)
    model = decorr_fx.transform(layer, config)
    (site,) = sites_of(model)
    counts = []
    for module in (model, layer):
        with FlopCounterMode(display=False) as counter:
            module(x.clone().requires_grad_()).sum().backward()
        counts.append(counter.get_total_flops())
    work = Work(batch * positions, x.numel())
    assert counts[0] - counts[1] == apply_flops([site.spec.layout], work)
    assert counts[1] == own_flops([site.spec.layout], work) - (layer.bias is None)


@pytest.mark.parametrize("rows", [16, 200])
@pytest.mark.parametrize("config", SHAPES[:4], ids=shape_of)
def test_moving_R_takes_the_flops_that_are_counted(config: DecorrConfig, rows: int) -> None:
    """Torch counts products only: inverses and eigenvalues are left out on both sides."""
    config = replace(config, max_samples=rows)
    model = decorr_fx.transform(nn.Conv1d(32, 20, 3), config)
    (site,) = sites_of(model)
    model(torch.randn(10, 32, 40))
    with FlopCounterMode(display=False) as counter:
        move([Move(site, site.recorded(), 0.01)])
    layout = site.spec.layout
    counted = move_flops([layout], Work(380, 10 * 32 * 40), config)
    uncounted = layout.rank**3 + EIGENVALUES * min(rows + layout.rank, layout.d) ** 3 if layout.rank else 0
    for stacks, m, _ in layout.factor_shapes if not layout.rank else []:
        n = site.spec.slots * layout.d // (stacks * m)
        uncounted += stacks * min(n, m) ** 3
    assert counter.get_total_flops() == counted - uncounted
