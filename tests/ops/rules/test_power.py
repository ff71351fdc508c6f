from dataclasses import dataclass

import pytest
import torch
from factors import dense_R, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from decorr_fx.ops import reference
from decorr_fx.ops.rules.power import (
    Learned,
    Past,
    Replacement,
    directions_to_shrink,
    largest_directions,
    learn,
    replace,
)

powers = st.sampled_from([0.0, 0.25, 0.5])
dampings = st.sampled_from([1e-2, 0.1, 1.0])
rates = st.sampled_from([0.0, 0.08, 1.0, 5.0])
STEPS = 3


@dataclass(frozen=True)
class Drawn:
    """What a step of some sites of some stacks starts from: a V, what is remembered, and rows, some of them unused."""

    V: Tensor
    scale: Tensor
    trace: Tensor
    x: Tensor
    used: int
    sites: int

    @property
    def sketch(self) -> Tensor:
        return self.scale[..., None] * self.V

    def learn(self, dtype: torch.dtype, rate: float) -> Learned:
        past = Past(self.scale.to(dtype), self.trace.to(dtype), torch.full((self.sites,), STEPS))
        count = torch.tensor(self.used).expand(len(self.x))
        return learn(self.V.to(dtype), self.x.to(dtype), count, past, rate)

    def step(self, dtype: torch.dtype, rate: float, power: float, damping: float) -> Replacement:
        learned = self.learn(dtype, rate)
        return replace(self.V.to(dtype), learned.sketch, learned.trace, power, damping)

    def running(self, i: int, rate: float) -> Tensor:
        """Return the second moment of stack number i after the step, before it is cut to its rank."""
        return reference.running_moment(self.sketch[i].T @ self.sketch[i], self.x[i, : self.used], STEPS, rate)

    def mean(self, i: int, rate: float) -> float:
        """Return the mean eigenvalue of all of the second moment after the step."""
        before = torch.diag(self.trace[i].expand(1)).double()
        norms = self.x[i, : self.used].norm(dim=1)[:, None]
        return float(reference.running_moment(before, norms, STEPS, rate)) / self.x.shape[2]


@st.composite
def drawn(draw: st.DrawFn) -> Drawn:
    sites, stacks, d = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 20))
    rank = draw(st.integers(1, d))
    used, unused = draw(st.integers(1, 12)), draw(st.integers(0, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    options = {"generator": generator, "dtype": torch.float64}
    directions = torch.linalg.qr(torch.randn(sites * stacks, d, d, **options))[0][:, :rank]
    V = 0.9 * torch.rand(sites * stacks, rank, 1, **options) * directions
    scale = 2 * torch.rand(sites * stacks, rank, **options)
    trace = 1.5 * (scale[..., None] * V).square().sum((1, 2))
    x = draw(st.sampled_from([0.1, 1.0, 10.0])) * torch.randn(sites * stacks, used + unused, d, **options)
    x[:, used:] = 0
    return Drawn(V, scale, trace, x, used, sites)


@given(drawn(), rates, powers, dampings)
@settings(max_examples=300)
def test_float32_R_agrees_with_the_float64_reference(d: Drawn, rate: float, power: float, damping: float) -> None:
    (V,) = d.step(torch.float32, rate, power, damping).factors
    for i in range(len(V)):
        expected = reference.shrinking(d.running(i, rate), d.mean(i, rate), V.shape[1], power, damping)
        assert relative(dense_R(V[i].double()), expected) < 1e-3


@given(drawn(), rates)
@settings(max_examples=200)
def test_the_sketch_is_the_second_moment_cut_to_its_rank(d: Drawn, rate: float) -> None:
    learned = d.learn(torch.float64, rate)
    sketch, trace = learned.sketch, learned.trace
    for i in range(len(sketch)):
        assert relative(sketch[i].T @ sketch[i], reference.truncated(d.running(i, rate), sketch.shape[1])) < 1e-9
        assert float(trace[i]) == pytest.approx(d.mean(i, rate) * d.x.shape[2])
        gram = sketch[i] @ sketch[i].T
        assert relative(gram, torch.diag(gram.diagonal())) < 1e-7


@given(drawn(), rates, st.sampled_from([0.1, 0.25, 0.5]), dampings)
@settings(max_examples=200)
def test_the_new_V_scaled_is_the_sketch(d: Drawn, rate: float, power: float, damping: float) -> None:
    """Which nothing else holds: the next step goes on from it."""
    sketch, step = d.learn(torch.float32, rate).sketch, d.step(torch.float32, rate, power, damping)
    torch.testing.assert_close(step.moments[0][..., None] * step.factors[0], sketch, rtol=1e-6, atol=0)


@given(drawn(), rates, powers, dampings)
@settings(max_examples=200)
def test_weights_follow_such_that_the_function_stands_still(
    d: Drawn, rate: float, power: float, damping: float
) -> None:
    W = torch.randn(len(d.x), 3, d.x.shape[2], dtype=torch.float64)
    step = d.step(torch.float64, rate, power, damping)
    stacks = len(W) // d.sites
    for site in range(d.sites):
        own = W[site * stacks : (site + 1) * stacks]
        followed = step.retreat(own, site, d.sites)
        for i, (before, after) in enumerate(zip(own, followed, strict=True), site * stacks):
            assert relative(after @ dense_R(step.factors[0][i]), before @ dense_R(d.V[i])) < 1e-9


def test_R_of_full_rank_and_power_one_half_whitens_what_is_far_above_the_damping() -> None:
    """Checked by what whitening is: the second moment of z is the same in all directions."""
    rows = torch.randn(50, 6, dtype=torch.float64) @ (torch.eye(6) + 0.2 * torch.ones(6, 6)).double()
    Sigma = reference.measure(rows).M
    delta = 1e-9 * torch.trace(Sigma)[None]
    sketch = largest_directions(rows[None] / 50**0.5, 6)
    z = rows @ dense_R(directions_to_shrink(sketch, delta, 0.5)[0])
    M = reference.measure(z).M
    assert relative(M / M[0, 0], torch.eye(6, dtype=torch.float64)) < 1e-4


@given(st.integers(1, 12), powers, dampings, st.integers(0, 1000))
@settings(max_examples=200)
def test_V_is_made_of_sketch_and_trace_alone_however_far_apart_eigenvalues_are(
    rank: int, power: float, damping: float, seed: int
) -> None:
    """In float32, from a sketch as other ranks receive it."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(20, rank, generator=generator, dtype=torch.float64))[0].mT
    sketch = 10 ** torch.empty(rank, 1, dtype=torch.float64).uniform_(-8, 4, generator=generator) * directions
    mean = 1.5 * float(sketch.square().sum()) / 20
    V = directions_to_shrink(sketch.float()[None], torch.tensor([damping * mean]), power)[0]
    expected = reference.shrinking(sketch.T @ sketch, mean, rank, power, damping)
    assert relative(dense_R(V.double()), expected) < 1e-6


@pytest.mark.parametrize("d", [3, 30], ids=["more rows than features", "fewer"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_rows_that_are_not_finite_spoil_neither_the_call_nor_their_neighbours(value: float, d: int) -> None:
    good = torch.randn(4, d)
    sketch = largest_directions(torch.stack([torch.full((4, d), value), good]), min(4, d))
    assert not sketch[0].isfinite().any()
    torch.testing.assert_close(sketch[1].T @ sketch[1], good.T @ good)


def test_rows_of_zeros_leave_R_at_the_identity() -> None:
    sketch = largest_directions(torch.zeros(1, 9, 3), 3)
    assert not directions_to_shrink(sketch, torch.zeros(1), 0.5).any()


def test_the_first_steps_take_the_plain_mean_of_all_rows_so_far() -> None:
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    V, scale, trace = (torch.zeros(*shape, dtype=torch.float64) for shape in ((1, 3, 3), (1, 3), (1,)))
    for i, rows in enumerate(x):
        learned = learn(V, rows[None], torch.tensor([5]), Past(scale, trace, torch.tensor([i])), 0.1)
        step = replace(V, learned.sketch, learned.trace, 0.5, 0.1)
        (V,), (scale, trace) = step.factors, step.moments
    torch.testing.assert_close(learned.sketch[0].T @ learned.sketch[0], reference.measure(x.flatten(0, 1)).M)


@pytest.mark.parametrize("d", [100, 600], ids=["more rows than features", "fewer"])
def test_directions_of_a_batch_on_several_threads(d: int) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        rows = torch.randn(3, 400, 30) @ torch.randn(3, 30, d)
        sketch = largest_directions(rows, 30)
        for own, B in zip(rows.double(), sketch.double(), strict=True):
            assert relative(B.T @ B, own.T @ own) < 1e-4
    finally:
        torch.set_num_threads(threads)
