from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import Laid, R, dense_of_group, drawn_R, laid
from torch import Tensor

from decorr_fx.ops import reference
from decorr_fx.ops.layout import (
    Factored,
    Layout,
    identity_factors,
    stack_rows,
    stack_weight,
    unfold_mode,
    unstack_weight,
)
from decorr_fx.ops.low_rank import LowRank

seeds = st.integers(0, 1000)


def assert_product(one: Laid, R: R, stacked: Tensor, transposed: bool = False, inverse: bool = False) -> None:
    """Check that stacked rows are those of a weight times R, or R^T, or R^-1."""
    W = one.weight()
    got = unstack_weight(stacked, W.shape, one.layout)
    assert got.shape == W.shape
    for group in range(one.layout.groups):
        matrix = dense_of_group(R, one.layout, group)
        matrix = matrix.T if transposed else torch.linalg.inv(matrix) if inverse else matrix
        torch.testing.assert_close(one.rows(got, group), reference.theta_of(one.rows(W, group), matrix))


@given(laid(), seeds)
@settings(max_examples=150)
def test_a_weight_times_R_is_the_dense_product_of_every_group(one: Laid, seed: int) -> None:
    R, stacked = drawn_R(one.layout, seed), stack_weight(one.weight(), one.layout)
    assert_product(one, R, R.times(stacked))
    assert_product(one, R, R.transposed.times(stacked), transposed=True)
    assert torch.equal(stacked, stack_weight(one.weight(), one.layout))
    R.times_(stacked)
    assert_product(one, R, stacked)


@given(laid(), seeds)
@settings(max_examples=60)
def test_division_by_R_is_the_product_with_its_inverse(one: Laid, seed: int) -> None:
    R = drawn_R(one.layout, seed)
    assert_product(one, R, R.divide(stack_weight(one.weight(), one.layout)), inverse=True)


def test_division_in_blocks_on_several_threads() -> None:
    """LU of a batch of large matrices on several threads fails in some builds of torch: nothing may rely on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        R, rows = Factored([torch.eye(256) + 0.02 * torch.randn(4, 256, 256)]), torch.randn(4, 5, 256)
        torch.testing.assert_close(R.times(R.divide(rows)), rows, rtol=1e-4, atol=1e-4)
    finally:
        torch.set_num_threads(threads)


@given(laid(), seeds)
@settings(max_examples=60)
def test_rows_are_mixed_by_the_same_matrix_as_weights(one: Laid, seed: int) -> None:
    layout, R = one.layout, drawn_R(one.layout, seed)
    x = torch.randn(3, layout.groups * layout.d, dtype=torch.float64)
    z = R.transposed.times(stack_rows(x[None], layout))
    flat = z.movedim(1, 0).reshape(3, layout.groups, layout.d)
    for group, rows in enumerate(x.reshape(3, layout.groups, layout.d).unbind(1)):
        expected = reference.decorrelate_rows(rows, dense_of_group(R, layout, group))
        torch.testing.assert_close(flat[:, group], expected)


@given(laid())
@settings(max_examples=60)
def test_unstacking_inverts_stacking(one: Laid) -> None:
    W, layout = one.weight(), one.layout
    stacked = stack_weight(W, layout)
    assert stacked.shape == (layout.stacks, layout.d_out, *layout.modes)
    assert torch.equal(unstack_weight(stacked, W.shape, layout), W)
    assert stacked.numel() == layout.size == W.numel()


@given(laid())
@settings(max_examples=60)
def test_R_starts_as_the_identity(one: Laid) -> None:
    layout = one.layout
    factors = identity_factors(layout, torch.device("cpu"), torch.float64)
    assert [f.shape for f in factors] == [torch.Size(shape) for shape in layout.factor_shapes]
    start = LowRank(factors[0]) if layout.rank else Factored(factors)
    for group in range(layout.groups):
        assert torch.equal(dense_of_group(start, layout, group), torch.eye(layout.d, dtype=torch.float64))


@given(laid(), st.integers(1, 40))
def test_every_factor_has_its_rows_and_hardly_more_samples_are_kept_than_that(one: Laid, max_samples: int) -> None:
    layout = one.layout
    slots = layout.slots(max_samples)
    if layout.rank:
        assert slots == max_samples
        return
    rows = stack_rows(torch.zeros(1, slots, layout.groups * layout.d), layout)
    fewest = min(unfold_mode(rows, mode, f).shape[1] for mode, (f, _, _) in enumerate(layout.factor_shapes))
    assert max_samples <= fewest < max_samples + fewest // slots


@pytest.mark.parametrize(
    ("layout", "shapes", "structure"),
    [
        (Layout(1, 10, 64, rank=32), [(1, 32, 64)], "rank 32"),
        (Layout(1, 10, 64), [(1, 64, 64)], "full"),
        (Layout(1, 256, 128, 9, blocks=2, paired=True), [(2, 64, 64), (1, 9, 9)], "kronecker x2"),
        (Layout(4, 32, 32, 9, blocks=2), [(8, 144, 144)], "block x2"),
        (Layout(2, 8, 6, 9, paired=True), [(2, 6, 6), (2, 9, 9)], "kronecker"),
        (Layout(3, 8, 4, 9, rank=5), [(3, 5, 36)], "rank 5"),
    ],
)
def test_shapes_of_factors_are_those_of_the_docs(
    layout: Layout, shapes: list[tuple[int, int, int]], structure: str
) -> None:
    assert layout.factor_shapes == shapes
    assert layout.structure == structure
    assert replace(layout, transposed=True).factor_shapes == shapes
