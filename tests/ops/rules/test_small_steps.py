import pytest
import torch
from factors import Drawn, relative, sites
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from decorr_fx.config import Crgd, Dbp, SmallSteps
from decorr_fx.ops import reference
from decorr_fx.ops.moment import Moment, losses
from decorr_fx.ops.rules.small_steps import STEP_BOUND, step_factors

rules = st.sampled_from([Crgd(), *(Dbp(kappa=kappa) for kappa in (0.0, 0.01, 0.5, 1.0))])
step_sizes = st.sampled_from([0.0, 1e-3, 0.05, 1.0, 100.0])


def fast(drawn: Drawn, dtype: torch.dtype, rule: SmallSteps, eps: float) -> tuple[list[Tensor], list[Moment]]:
    x = drawn.x.to(dtype)
    count = torch.tensor(drawn.used).expand(len(x))
    return step_factors([f.to(dtype) for f in drawn.factors], x, count, rule, eps)


def expected_of(drawn: Drawn, matrix: int, rule: SmallSteps, eps: float) -> tuple[list[Tensor], Tensor | None]:
    rows = drawn.rows(matrix, drawn.x[:, : drawn.used])
    return reference.step_factors(*drawn.parts(matrix), rows, rule, eps)


@given(sites(), rules, step_sizes)
@settings(max_examples=300)
def test_float32_steps_agree_with_the_float64_reference(drawn: Drawn, rule: SmallSteps, eps: float) -> None:
    stepped, _ = fast(drawn, torch.float32, rule, eps)
    for matrix in range(drawn.matrices):
        blocks, taps = drawn.parts(matrix, stepped)
        expected_blocks, expected_taps = expected_of(drawn, matrix, rule, eps)
        for got, block in zip(blocks, expected_blocks, strict=True):
            assert relative(got, block) < 1e-5
        assert taps is None or relative(taps, expected_taps) < 1e-5


@given(sites(), rules)
def test_z_is_measured_as_it_was_before_the_step(drawn: Drawn, rule: SmallSteps) -> None:
    _, of_z = fast(drawn, torch.float64, rule, 0.01)
    for matrix in range(drawn.matrices):
        z = drawn.rows(matrix, drawn.x[:, : drawn.used]) @ reference.dense(*drawn.parts(matrix)).T
        each = z.reshape(drawn.used, -1, *drawn.x.shape[2:])
        for i, block in enumerate(each.unbind(1), drawn.blocks(matrix).start):
            rows = block.movedim(1, -1).reshape(-1, each.shape[2])
            assert float(of_z[0].correlation()[i]) == pytest.approx(
                reference.correlation_loss(rows), rel=1e-8, abs=1e-12
            )
            assert float(of_z[0].variance_error()[i]) == pytest.approx(reference.variance_loss(rows), rel=1e-8)
        if each.dim() == 4:
            rows = each.reshape(-1, each.shape[3])
            assert float(of_z[1].correlation()[matrix]) == pytest.approx(reference.correlation_loss(rows), rel=1e-8)


@given(sites(), st.sampled_from([Dbp(), Crgd()]))
def test_each_site_has_a_count_of_its_own(drawn: Drawn, rule: SmallSteps) -> None:
    x = drawn.x.clone()
    x[drawn.blocks(0), 1:] = 0  # one row only
    counts = torch.full((len(x),), drawn.used)
    counts[drawn.blocks(0)] = 1
    stepped, _ = step_factors(drawn.factors, x, counts, rule, 0.05)
    for matrix in range(drawn.matrices):
        own = Drawn(drawn.factors, x, 1 if matrix == 0 else drawn.used)
        expected_blocks, expected_taps = expected_of(own, matrix, rule, 0.05)
        blocks, taps = drawn.parts(matrix, stepped)
        for got, block in zip(blocks, expected_blocks, strict=True):
            assert relative(got, block) < 1e-10
        assert taps is None or relative(taps, expected_taps) < 1e-10


@given(sites(), st.sampled_from([0.0, 0.01, 0.5, 1.0]))
def test_no_step_is_longer_than_the_bound(drawn: Drawn, kappa: float) -> None:
    stepped, _ = fast(drawn, torch.float64, Dbp(kappa=kappa), 1e9)
    for before, after in zip(drawn.factors, stepped, strict=True):
        assert after.isfinite().all()
        if float(torch.linalg.cond(before).max()) > 1e6:
            continue  # T = after before^-1 cannot be read off
        move = torch.linalg.solve(before.mT, (before - after).mT).mT
        assert (torch.linalg.matrix_norm(move, ord=2) <= STEP_BOUND * (1 + 1e-8)).all()


@pytest.mark.parametrize("rows", [8, 400])
def test_steps_decorrelate_rows_of_a_badly_conditioned_input(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    x = 30 * (torch.randn(rows, 6, generator=generator, dtype=torch.float64) @ mixing)[None]
    factors = [torch.eye(6, dtype=torch.float64)[None]]
    for _ in range(2000):
        factors, of_z = step_factors(factors, x, torch.tensor([rows]), Dbp(), 0.5)
    correlation, variance_error = losses(of_z, 1)[0].tolist()
    assert correlation < 1e-6
    assert variance_error < 1e-6


@pytest.mark.parametrize("eps", [1e-3, 0.1])
def test_crgd_keeps_the_norm_of_z_at_that_of_x_and_decorrelates(eps: float) -> None:
    """The gain is that of z before the step: so it is the next one that has its norm."""
    x = (torch.randn(200, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64))[None]
    factors, found = [torch.eye(6, dtype=torch.float64)[None]], []
    for _ in range(500):
        factors, of_z = step_factors(factors, x, torch.tensor([200]), Crgd(), eps)
        found.append(float(losses(of_z, 1)[0, 0]))
    ratio = (x[0].norm(dim=1) / (x[0] @ factors[0][0].T).norm(dim=1)).mean()
    assert 0.9 < float(ratio) < 2.5
    assert found[-1] < 0.5 * found[0]


def test_variance_errors_act_on_the_rows_of_R() -> None:
    """On the columns, as a public implementation has it, the same step would diverge on this input."""
    R = torch.tensor([[2.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    stepped, _ = step_factors([R[None]], x[None], torch.tensor([2]), Dbp(kappa=1.0), 0.01)
    variance = torch.tensor([2.5, 0.5], dtype=torch.float64)
    torch.testing.assert_close(stepped[0][0], R - 0.01 * (variance - 1)[:, None] * R)


@pytest.mark.parametrize("rule", [Dbp(), Crgd()])
def test_without_rows_a_step_has_no_value_and_raises_nothing(rule: SmallSteps) -> None:
    stepped, _ = step_factors([torch.eye(3)[None]], torch.zeros(1, 4, 3), torch.tensor([0]), rule, 0.1)
    assert not stepped[0].isfinite().all()  # the site refuses it
