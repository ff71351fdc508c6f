from math import inf

import torch
from cases import LayerCase, layer_cases
from factors import dense_R
from hypothesis import given, settings
from hypothesis import strategies as st

from decorr_fx import DecorrConfig
from decorr_fx.ops import reference
from decorr_fx.ops.cost import Work, choose_layouts
from decorr_fx.ops.layout import (
    Layout,
    decorrelate_rows,
    fold_taps,
    fold_weight,
    identity_factors,
    mix_channels,
    stack_rows,
    stack_weight,
    unfold_mode,
    unstack_weight,
)


def laid_out(plain: Layout, structure: str, max_dim: int) -> Layout:
    rule = DecorrConfig(rank=max_dim) if structure == "rank" else None
    config = rule or DecorrConfig(rule="dbp", structure=structure, max_dim=max_dim)
    return choose_layouts([plain], config, Work.unknown(plain), affordable=inf)[0]


def plain_layout(case: LayerCase) -> Layout:
    layer, _ = case.make()
    shape, groups = layer.weight.shape, getattr(layer, "groups", 1)
    taps = shape[2:].numel()
    if "Transpose" in case.cls.__name__:
        return Layout(groups, shape[1], shape[0] // groups, taps, transposed=True)
    return Layout(groups, shape[0] // groups, shape[1], taps)


def factors_of(layout: Layout, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in layout.factor_shapes]


def dense_of_group(factors: list[torch.Tensor], layout: Layout, group: int) -> torch.Tensor:
    """Return R of one group as one matrix over its channel-major features."""
    if layout.rank:
        return dense_R(factors[0][group])
    blocks = range(group * layout.blocks, (group + 1) * layout.blocks)
    taps = None
    if layout.paired:
        taps = factors[1][group] if layout.mixes_taps else torch.eye(layout.taps, dtype=torch.float64)
    return reference.dense([factors[0][block] for block in blocks], taps)


structures = st.sampled_from(["rank", "auto", "full", "kronecker", "channels", "block"])


@given(layer_cases(), structures, st.integers(1, 12))
@settings(max_examples=150)
def test_folding_is_the_dense_product_of_every_group(case: LayerCase, structure: str, max_dim: int) -> None:
    layout = laid_out(plain_layout(case), structure, max_dim)
    W = case.make()[0].weight.detach()
    factors = factors_of(layout)
    folded = fold_weight(W, factors, layout)
    assert folded.shape == W.shape
    axis = 1 if layout.transposed else 0
    by_group = zip(W.chunk(layout.groups, 0), folded.chunk(layout.groups, 0), strict=True)
    for group, (plain, got) in enumerate(by_group):
        rows = (plain.transpose(0, axis)).reshape(layout.d_out, layout.d)
        expected = reference.fold_rows(rows, dense_of_group(factors, layout, group))
        torch.testing.assert_close(got.transpose(0, axis).reshape(layout.d_out, layout.d), expected)


@given(layer_cases(), structures, st.integers(1, 12))
@settings(max_examples=60)
def test_rows_are_mixed_by_the_same_matrix_as_weights(case: LayerCase, structure: str, max_dim: int) -> None:
    layout = laid_out(plain_layout(case), structure, max_dim)
    factors = factors_of(layout)
    x = torch.randn(3, layout.groups * layout.d, dtype=torch.float64)
    z = decorrelate_rows(stack_rows(x[None], layout), factors, layout)
    flat = z.movedim(1, 0).reshape(3, layout.groups, layout.d)
    for group, rows in enumerate(x.reshape(3, layout.groups, layout.d).unbind(1)):
        expected = reference.decorrelate_rows(rows, dense_of_group(factors, layout, group))
        torch.testing.assert_close(flat[:, group], expected)


@given(layer_cases(), structures, st.integers(1, 12))
@settings(max_examples=60)
def test_unstacking_inverts_stacking(case: LayerCase, structure: str, max_dim: int) -> None:
    layout = laid_out(plain_layout(case), structure, max_dim)
    W = case.make()[0].weight.detach()
    assert torch.equal(unstack_weight(stack_weight(W, layout), W.shape, layout), W)


@given(layer_cases(), structures, st.integers(1, 12))
@settings(max_examples=60)
def test_R_starts_as_the_identity(case: LayerCase, structure: str, max_dim: int) -> None:
    layout = laid_out(plain_layout(case), structure, max_dim)
    factors = identity_factors(layout, torch.device("cpu"), torch.float64)
    assert [f.shape for f in factors] == [torch.Size(shape) for shape in layout.factor_shapes]
    assert torch.equal(dense_of_group(factors, layout, 0), torch.eye(layout.d, dtype=torch.float64))


@given(layer_cases(), structures)
def test_a_layout_survives_being_written_as_numbers(case: LayerCase, structure: str) -> None:
    layout = laid_out(plain_layout(case), structure, 5)
    assert Layout.of_numbers(layout.numbers) == layout


def test_folding_is_differentiable_in_the_weight_and_in_the_factors() -> None:
    layout = Layout(groups=2, d_out=2, channels=4, taps=3, blocks=2, paired=True)
    W = torch.randn(4, 4, 3, dtype=torch.float64, requires_grad=True)
    factors = [f.requires_grad_() for f in factors_of(layout)]
    assert torch.autograd.gradcheck(lambda W, *f: fold_weight(W, f, layout), (W, *factors))
    assert torch.autograd.gradgradcheck(lambda W, *f: fold_weight(W, f, layout), (W, *factors))


@given(layer_cases(), structures, st.integers(1, 12))
@settings(max_examples=100)
def test_R_on_the_channels_of_the_input_is_R_on_the_weight(case: LayerCase, structure: str, max_dim: int) -> None:
    layer, x = case.make()
    layout = laid_out(plain_layout(case), structure, max_dim)
    factors, W = factors_of(layout), layer.weight.detach()
    if not layout.on_channels:
        return
    spatial = W.dim() - 2

    def outputs(x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
        layer.weight.data = W
        return layer(x).detach()

    on_weight = outputs(x, fold_weight(W, factors, layout))
    on_input = outputs(mix_channels(x, factors[0], spatial, layout), fold_taps(W, factors))
    torch.testing.assert_close(on_input, on_weight)


@given(layer_cases(), structures, st.integers(1, 40))
def test_every_factor_has_its_rows_and_hardly_more_samples_are_kept_than_that(
    case: LayerCase, structure: str, max_samples: int
) -> None:
    layout = laid_out(plain_layout(case), structure, 256)
    if layout.rank:
        assert layout.slots(max_samples) == max_samples
        return
    slots = layout.slots(max_samples)
    rows = stack_rows(torch.zeros(1, slots, layout.groups * layout.d), layout)
    fewest = min(unfold_mode(rows, mode, f).shape[1] for mode, (f, _, _) in enumerate(layout.factor_shapes))
    assert max_samples <= fewest < max_samples + fewest // slots
