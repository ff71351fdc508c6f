import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from decorr_fx.config import RuleName
from decorr_fx.ops import reference
from decorr_fx.ops.rules import RULES, STEP_BOUND, Step, step_factors

Drawn = tuple[list[Tensor], Tensor, int]
modes = st.one_of(st.tuples(st.integers(1, 12)), st.tuples(st.integers(2, 6), st.integers(2, 5)))
rules = st.sampled_from(list(RULES))
step_sizes = st.sampled_from([0.0, 1e-3, 0.05, 1.0, 100.0])
kappas = st.sampled_from([0.0, 0.01, 0.5, 1.0])


@st.composite
def sites(draw: st.DrawFn) -> Drawn:
    """Draw factors near the identity, rows with unused ones at the end, and the number of rows in use."""
    sides, stacks = draw(modes), draw(st.integers(1, 3))
    used, unused = draw(st.integers(1, 20)), draw(st.integers(0, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    noise = [torch.randn(stacks, side, side, generator=generator, dtype=torch.float64) for side in sides]
    factors = [torch.eye(n.shape[-1], dtype=torch.float64) + 0.2 * n for n in noise]
    x = draw(st.sampled_from([0.1, 1.0, 10.0])) * torch.randn(
        stacks, used + unused, *sides, generator=generator, dtype=torch.float64
    )
    x[:, used:] = 0
    return factors, x, used


def fast(drawn: Drawn, dtype: torch.dtype, rule: RuleName, lr: float, kappa: float) -> Step:
    factors, x, used = drawn
    return step_factors([f.to(dtype) for f in factors], x.to(dtype), torch.tensor(used).expand(len(x)), rule, lr, kappa)


def expected_of_stack(
    drawn: Drawn, stack: int, rule: RuleName, lr: float, kappa: float
) -> tuple[list[Tensor], list[Tensor]]:
    factors, x, used = drawn
    rows = x[stack, :used].flatten(1)
    return reference.step_factors([f[stack] for f in factors], rows, rule, lr, kappa)


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1e-12))


@given(sites(), rules, step_sizes, kappas)
@settings(max_examples=300)
def test_float32_steps_agree_with_the_float64_reference(drawn: Drawn, rule: RuleName, lr: float, kappa: float) -> None:
    step = fast(drawn, torch.float32, rule, lr, kappa)
    for stack in range(len(drawn[1])):
        factors, _ = expected_of_stack(drawn, stack, rule, lr, kappa)
        for got, expected in zip(step.factors, factors, strict=True):
            assert relative(got[stack], expected) < 1e-5


@given(sites(), rules, step_sizes, kappas)
@settings(max_examples=300)
def test_weights_that_follow_agree_with_the_reference_and_leave_the_function(
    drawn: Drawn, rule: RuleName, lr: float, kappa: float
) -> None:
    factors, x, _ = drawn
    W = torch.randn(len(x), 3, *x.shape[2:], dtype=torch.float64)
    step = fast(drawn, torch.float32, rule, lr, kappa)
    followed = step.retreat(W.float())
    for stack in range(len(x)):
        moved, transitions = expected_of_stack(drawn, stack, rule, lr, kappa)
        rows = W[stack].flatten(1)
        expected = reference.retreat_rows(rows, transitions)
        assert relative(followed[stack].flatten(1), expected) < 1e-5
        before = rows @ reference.dense([f[stack] for f in factors])
        assert relative(expected @ reference.dense(moved), before) < 1e-10


@given(sites(), rules, kappas)
def test_losses_agree_with_the_reference(drawn: Drawn, rule: RuleName, kappa: float) -> None:
    factors, x, used = drawn
    step = fast(drawn, torch.float64, rule, 0.01, kappa)
    for stack in range(len(x)):
        z = x[stack, :used].flatten(1) @ reference.dense([f[stack] for f in factors]).T
        losses = []
        for mode, side in enumerate(x.shape[2:]):
            rows = z.reshape(used, *x.shape[2:]).movedim(1 + mode, -1).reshape(-1, side)
            losses.append((reference.correlation_loss(rows), reference.variance_loss(rows)))
        correlation, variance_error = (sum(values) / len(losses) for values in zip(*losses, strict=True))
        assert float(step.correlation()[stack]) == pytest.approx(correlation, rel=1e-8, abs=1e-12)
        assert float(step.variance_error()[stack]) == pytest.approx(variance_error, rel=1e-8, abs=1e-12)


@given(sites())
def test_each_stack_has_a_count_of_its_own(drawn: Drawn) -> None:
    factors, x, used = drawn
    x = x.clone()
    x[0, 1:] = 0  # one row only
    counts = torch.tensor([1] + [used] * (len(x) - 1))
    step = step_factors(factors, x, counts, "dbp", 0.05, 0.5)
    for stack, count in enumerate(counts.tolist()):
        expected, _ = expected_of_stack((factors, x, count), stack, "dbp", 0.05, 0.5)
        for got, factor in zip(step.factors, expected, strict=True):
            assert relative(got[stack], factor) < 1e-10


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
    losses = []
    for _ in range(2000):
        step = step_factors(factors, x, torch.tensor([rows]), rule, 0.5, 0.5)
        factors = step.factors
        losses.append((float(step.correlation()), float(step.variance_error())))
    assert losses[-1][0] < 1e-6
    assert losses[-1][1] < 1e-6


def test_variance_errors_act_on_the_rows_of_R() -> None:
    """On the columns, as a public implementation has it, the same step would diverge on this input."""
    R = torch.tensor([[2.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    step = step_factors([R[None]], x[None], torch.tensor([2]), "dbp", 0.01, 1.0)
    variance = torch.tensor([2.5, 0.5], dtype=torch.float64)
    torch.testing.assert_close(step.factors[0][0], R - 0.01 * (variance - 1)[:, None] * R)


def test_without_rows_a_step_has_no_value_and_raises_nothing() -> None:
    step = step_factors([torch.eye(3)[None]], torch.zeros(1, 4, 3), torch.tensor([0]), "dbp", 0.1, 0.5)
    assert not step.factors[0].isfinite().all()  # the site refuses it


def test_weights_follow_in_blocks_on_several_threads() -> None:
    """LU of a batch of large matrices on several threads fails in some builds of torch: nothing may rely on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        x, W = torch.randn(4, 300, 256), torch.randn(4, 5, 256)
        factors = [torch.eye(256).repeat(4, 1, 1)]
        step = step_factors(factors, x, torch.tensor([300]).expand(4), "dbp", 0.01, 0.5)
        torch.testing.assert_close(step.retreat(W) @ step.factors[0], W, rtol=1e-4, atol=1e-4)
    finally:
        torch.set_num_threads(threads)
