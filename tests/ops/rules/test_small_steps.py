from statistics import mean

import pytest
import torch
from factors import Drawn, relative, sites
from hypothesis import given, settings
from hypothesis import strategies as st

from decorr_fx.config import DecorrConfig, RuleName
from decorr_fx.ops import reference
from decorr_fx.ops.rules.small_steps import RULES, STEP_BOUND
from decorr_fx.ops.rules.step import SmallStep, losses, step_factors

rules = st.sampled_from(list(RULES))
step_sizes = st.sampled_from([0.0, 1e-3, 0.05, 1.0, 100.0])
kappas = st.sampled_from([0.0, 0.01, 0.5, 1.0])
DBP = DecorrConfig(rule="dbp")


def fast(drawn: Drawn, dtype: torch.dtype, rule: RuleName, lr: float, kappa: float) -> SmallStep:
    x = drawn.x.to(dtype)
    count = torch.tensor(drawn.used).expand(len(x))
    config = DecorrConfig(rule=rule, kappa=kappa)
    return step_factors([f.to(dtype) for f in drawn.factors], x, count, config, lr)


def expected_of(drawn: Drawn, matrix: int, rule: RuleName, lr: float, kappa: float) -> reference.Stepped:
    rows = drawn.rows(matrix, drawn.x[:, : drawn.used])
    return reference.step_factors(*drawn.parts(matrix), rows, rule, lr, kappa)


@given(sites(), rules, step_sizes, kappas)
@settings(max_examples=300)
def test_float32_steps_agree_with_the_float64_reference(drawn: Drawn, rule: RuleName, lr: float, kappa: float) -> None:
    step = fast(drawn, torch.float32, rule, lr, kappa)
    for matrix in range(drawn.matrices):
        blocks, taps = drawn.parts(matrix, step.factors)
        expected = expected_of(drawn, matrix, rule, lr, kappa)
        for got, block in zip(blocks, expected.blocks, strict=True):
            assert relative(got, block) < 1e-5
        assert taps is None or relative(taps, expected.taps) < 1e-5


@given(sites(), rules, step_sizes, kappas)
@settings(max_examples=300)
def test_weights_that_follow_agree_with_the_reference_and_leave_the_function(
    drawn: Drawn, rule: RuleName, lr: float, kappa: float
) -> None:
    W = torch.randn(len(drawn.x), 3, *drawn.x.shape[2:], dtype=torch.float64)
    followed = fast(drawn, torch.float32, rule, lr, kappa).retreat(W.float())
    for matrix in range(drawn.matrices):
        moved = expected_of(drawn, matrix, rule, lr, kappa)
        rows = drawn.rows(matrix, W)
        expected = reference.retreat_rows(rows, moved.T_blocks, moved.T_taps)
        assert relative(drawn.rows(matrix, followed), expected) < 1e-5
        before = rows @ reference.dense(*drawn.parts(matrix))
        assert relative(expected @ reference.dense(moved.blocks, moved.taps), before) < 1e-10


@given(sites(), rules, kappas)
def test_losses_agree_with_the_reference(drawn: Drawn, rule: RuleName, kappa: float) -> None:
    step = fast(drawn, torch.float64, rule, 0.01, kappa)
    for matrix in range(drawn.matrices):
        z = drawn.rows(matrix, drawn.x[:, : drawn.used]) @ reference.dense(*drawn.parts(matrix)).T
        each = z.reshape(drawn.used, -1, *drawn.x.shape[2:])
        of_blocks = [block.movedim(1, -1).reshape(-1, each.shape[2]) for block in each.unbind(1)]
        modes = [of_blocks, [each.reshape(-1, each.shape[3])]] if each.dim() == 4 else [of_blocks]
        for i, loss in enumerate([reference.correlation_loss, reference.variance_loss]):
            expected = mean(mean(loss(rows) for rows in of_mode) for of_mode in modes)
            assert float(losses(step.of_z, drawn.matrices)[matrix, i]) == pytest.approx(expected, rel=1e-8, abs=1e-12)


@given(sites())
def test_each_site_has_a_count_of_its_own(drawn: Drawn) -> None:
    x = drawn.x.clone()
    x[drawn.blocks(0), 1:] = 0  # one row only
    counts = torch.full((len(x),), drawn.used)
    counts[drawn.blocks(0)] = 1
    step = step_factors(drawn.factors, x, counts, DBP, 0.05)
    for matrix in range(drawn.matrices):
        own = Drawn(drawn.factors, x, 1 if matrix == 0 else drawn.used)
        expected = expected_of(own, matrix, "dbp", 0.05, 0.5)
        for got, block in zip(drawn.parts(matrix, step.factors)[0], expected.blocks, strict=True):
            assert relative(got, block) < 1e-10


@given(sites(), rules, kappas)
def test_no_step_is_longer_than_the_bound(drawn: Drawn, rule: RuleName, kappa: float) -> None:
    step = fast(drawn, torch.float64, rule, 1e9, kappa)
    for transition, factor in zip(step.transitions, step.factors, strict=True):
        assert factor.isfinite().all()
        eye = torch.eye(factor.shape[-1], dtype=torch.float64).expand_as(factor)
        move = eye - transition.advance(eye) / transition.gain
        assert (torch.linalg.matrix_norm(move, ord=2) <= STEP_BOUND * (1 + 1e-9)).all()


@pytest.mark.parametrize("rule", ["dbp", "dbp-normalized"])
@pytest.mark.parametrize("rows", [8, 400])
def test_steps_decorrelate_rows_of_a_badly_conditioned_input(rule: RuleName, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    x = 30 * (torch.randn(rows, 6, generator=generator, dtype=torch.float64) @ mixing)[None]
    factors = [torch.eye(6, dtype=torch.float64)[None]]
    found = []
    for _ in range(2000):
        step = step_factors(factors, x, torch.tensor([rows]), DecorrConfig(rule=rule), 0.5)
        factors = step.factors
        found.append(losses(step.of_z, 1)[0].tolist())
    assert found[-1][0] < 1e-6
    assert found[-1][1] < 1e-6


def test_variance_errors_act_on_the_rows_of_R() -> None:
    """On the columns, as a public implementation has it, the same step would diverge on this input."""
    R = torch.tensor([[2.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    step = step_factors([R[None]], x[None], torch.tensor([2]), DecorrConfig(rule="dbp", kappa=1.0), 0.01)
    variance = torch.tensor([2.5, 0.5], dtype=torch.float64)
    torch.testing.assert_close(step.factors[0][0], R - 0.01 * (variance - 1)[:, None] * R)


def test_without_rows_a_step_has_no_value_and_raises_nothing() -> None:
    step = step_factors([torch.eye(3)[None]], torch.zeros(1, 4, 3), torch.tensor([0]), DBP, 0.1)
    assert not step.factors[0].isfinite().all()  # the site refuses it


def test_weights_follow_in_blocks_on_several_threads() -> None:
    """LU of a batch of large matrices on several threads fails in some builds of torch: nothing may rely on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        x, W = torch.randn(4, 300, 256), torch.randn(4, 5, 256)
        factors = [torch.eye(256).repeat(4, 1, 1)]
        step = step_factors(factors, x, torch.tensor([300]).expand(4), DBP, 0.01)
        torch.testing.assert_close(step.retreat(W) @ step.factors[0], W, rtol=1e-4, atol=1e-4)
    finally:
        torch.set_num_threads(threads)
