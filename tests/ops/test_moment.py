import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from decorr_fx.ops import reference
from decorr_fx.ops.moment import Moment, losses


@st.composite
def drawn(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Return rows of some stacks, and how many of each are in use: fewer than there are features, and more."""
    stacks, n, d = draw(st.integers(1, 4)), draw(st.integers(1, 12)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    z = torch.randn(stacks, n, d, generator=generator, dtype=torch.float64)
    count = torch.tensor([draw(st.integers(1, n)) for _ in range(stacks)])
    for own, used in zip(z, count, strict=True):
        own[used:] = 0
    return z, count


def measured(z: Tensor, count: Tensor) -> list[reference.Measured]:
    return [reference.measure(own[:used]) for own, used in zip(z, count.tolist(), strict=True)]


@given(drawn())
def test_a_moment_agrees_with_the_reference(one: tuple[Tensor, Tensor]) -> None:
    z, count = one
    moment = Moment.of(z, count[:, None, None])
    right = torch.randn(len(z), z.shape[2], 3, dtype=torch.float64)
    for i, (C, _, M) in enumerate(measured(z, count)):
        torch.testing.assert_close(moment.variance[i], M.diagonal())
        torch.testing.assert_close(moment.norm[i], M.norm())
        torch.testing.assert_close(moment.correlations_times(right)[i], C @ right[i])
        assert moment.off_diagonal is None or torch.allclose(moment.off_diagonal[i], C)


@given(drawn())
def test_the_bound_of_the_largest_eigenvalue_is_that_of_the_reference_and_near(one: tuple[Tensor, Tensor]) -> None:
    z, count = one
    largest = Moment.of(z, count[:, None, None]).largest()
    for bound, (_, _, M) in zip(largest, measured(z, count), strict=True):
        torch.testing.assert_close(bound, reference.largest_eigenvalue(M))
        exact = float(torch.linalg.eigvalsh(M)[-1])
        assert exact * (1 - 1e-9) <= float(bound) <= exact * min(z.shape[1:]) ** 0.25 * (1 + 1e-9)


@pytest.mark.parametrize("size", [1e-8, 1e8])
def test_the_bound_neither_overflows_nor_vanishes_in_float32(size: float) -> None:
    """Where M^2 would."""
    z = size * torch.randn(1, 8, 3)
    largest = Moment.of(z, torch.tensor(8).reshape(1, 1, 1)).largest()
    exact = torch.linalg.eigvalsh(z[0].double().T @ z[0].double() / 8)[-1]
    assert 0.99 < float(largest) / float(exact) < 3**0.25 + 0.01


@given(drawn())
def test_losses_are_the_means_of_the_stacks_of_each_site_and_of_its_factors(one: tuple[Tensor, Tensor]) -> None:
    z, count = one
    twice = torch.cat([z, 2 * z])
    moments = [Moment.of(scale * twice, count.repeat(2)[:, None, None]) for scale in (1, 3)]
    found = losses(moments, 2)
    for site, size in enumerate((1, 2)):
        rows = [scale * size * own[:used] for scale in (1, 3) for own, used in zip(z, count.tolist(), strict=True)]
        for i, loss in enumerate((reference.correlation_loss, reference.variance_loss)):
            expected = sum(map(loss, rows)) / len(rows)
            assert float(found[site, i]) == pytest.approx(expected, rel=1e-8, abs=1e-10)


def test_rows_of_zeros_have_no_correlations_and_no_size() -> None:
    moment = Moment.of(torch.zeros(2, 4, 3), torch.tensor([4, 4])[:, None, None])
    assert moment.largest().tolist() == [0, 0] and moment.correlation().tolist() == [0, 0]
    assert moment.variance_error().tolist() == [1, 1]
