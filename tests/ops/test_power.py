import pytest
import torch
from factors import Drawn, relative, sites
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from decorr_fx.config import DecorrConfig
from decorr_fx.ops import reference
from decorr_fx.ops.power import Past, root
from decorr_fx.ops.step import Step, step_factors

powers = st.sampled_from([0.0, 0.125, 0.25, 0.5])
dampings = st.sampled_from([1e-3, 0.01, 1.0])
rates = st.sampled_from([0.0, 0.08, 1.0, 5.0])
STEPS, GAIN = 3, 0.7


def past_of(drawn: Drawn, dtype: torch.dtype) -> Past:
    moments = [f.to(dtype) @ f.to(dtype).mT for f in drawn.factors]
    return Past(moments, torch.full((drawn.matrices,), STEPS))


def fast(drawn: Drawn, dtype: torch.dtype, rate: float, power: float, damping: float) -> Step:
    x = drawn.x.to(dtype)
    config = DecorrConfig(rule="power", power=power, damping=damping, gain=GAIN)
    count = torch.tensor(drawn.used).expand(len(x))
    return step_factors([f.to(dtype) for f in drawn.factors], x, count, config, rate, past_of(drawn, dtype))


def expected_roots(drawn: Drawn, matrix: int, rate: float, power: float, damping: float) -> list[Tensor]:
    """Return the new blocks of one matrix, and then its factor over taps where there is one."""
    x, past = drawn.x[:, : drawn.used], past_of(drawn, torch.float64)
    blocks = range(drawn.blocks(matrix).start, drawn.blocks(matrix).stop)
    rows = [x[b].movedim(1, -1).flatten(0, -2) for b in blocks]
    old = [past.moments[0][b] for b in blocks]
    if len(drawn.factors) > 1:
        rows.append(x[drawn.blocks(matrix)].flatten(0, -2))
        old.append(past.moments[1][matrix])
    sigmas = [reference.running_moment(Sigma, r, STEPS, rate) for Sigma, r in zip(old, rows, strict=True)]
    first = len(blocks)
    return [(GAIN if i < first else 1.0) * reference.root(Sigma, power, damping) for i, Sigma in enumerate(sigmas)]


@given(sites(), rates, powers, dampings)
@settings(max_examples=300)
def test_float32_factors_agree_with_the_float64_reference(
    drawn: Drawn, rate: float, power: float, damping: float
) -> None:
    step = fast(drawn, torch.float32, rate, power, damping)
    for matrix in range(drawn.matrices):
        blocks, taps = drawn.parts(matrix, step.factors)
        got = [*blocks, *([] if taps is None else [taps])]
        for factor, expected in zip(got, expected_roots(drawn, matrix, rate, power, damping), strict=True):
            assert relative(factor, expected) < 1e-4


@given(sites(), rates, powers, dampings)
@settings(max_examples=300)
def test_weights_follow_such_that_the_function_stands_still(
    drawn: Drawn, rate: float, power: float, damping: float
) -> None:
    W = torch.randn(len(drawn.x), 3, *drawn.x.shape[2:], dtype=torch.float64)
    step = fast(drawn, torch.float64, rate, power, damping)
    followed = step.retreat(W)
    for matrix in range(drawn.matrices):
        before = drawn.rows(matrix, W) @ reference.dense(*drawn.parts(matrix))
        after = drawn.rows(matrix, followed) @ reference.dense(*drawn.parts(matrix, step.factors))
        assert relative(after, before) < 1e-9


@given(st.integers(1, 12), st.integers(0, 1000), powers, dampings)
def test_a_root_is_a_power_that_keeps_the_mean_square_of_rows(d: int, seed: int, power: float, damping: float) -> None:
    """Checked by what a root is: its own power is the inverse of what it was taken from, but for the gain."""
    rows = torch.randn(5, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    Sigma = rows.T @ rows
    R, inverse = (matrix[0] for matrix in root(Sigma[None], power, damping))
    assert relative(R @ inverse, torch.eye(d, dtype=torch.float64)) < 1e-9
    assert relative((rows @ R.T).square().sum(), rows.square().sum()) < 1e-9
    if power:
        damped = Sigma + damping * Sigma.trace() / d * torch.eye(d, dtype=torch.float64)
        product = torch.linalg.matrix_power(R, round(1 / power)) @ damped
        assert relative(product / product[0, 0], torch.eye(d, dtype=torch.float64)) < 1e-8


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_what_has_no_root_spoils_neither_the_call_nor_its_neighbours(value: float) -> None:
    good = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    R, _ = root(torch.stack([torch.full((3, 3), value), good]), 0.25, 0.01)
    assert not R[0].isfinite().any()
    torch.testing.assert_close(R[1].double(), reference.root(good.double(), 0.25, 0.01), rtol=1e-6, atol=1e-6)


def test_the_first_steps_take_the_plain_mean_of_all_rows_so_far() -> None:
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    moments, config = [torch.zeros(1, 3, 3, dtype=torch.float64)], DecorrConfig(rule="power")
    for i, rows in enumerate(x):
        past = Past(moments, torch.tensor([i]))
        moments = list(
            step_factors([torch.eye(3).double()[None]], rows[None], torch.tensor([5]), config, 0.1, past).moments
        )
    torch.testing.assert_close(moments[0][0], reference.measure(x.flatten(0, 1)).M)


def test_roots_of_a_batch_on_several_threads() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        rows = torch.randn(3, 400, 256)
        R, inverse = root(rows.mT @ rows, 0.25, 0.01)
        torch.testing.assert_close(R @ inverse, torch.eye(256).expand(3, 256, 256), rtol=1e-4, atol=1e-4)
    finally:
        torch.set_num_threads(threads)
