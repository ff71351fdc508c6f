from dataclasses import dataclass, replace

import pytest
import torch
from factors import dense_R, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from decorr_fx import Power
from decorr_fx.ops import reference
from decorr_fx.ops.moment import Moment
from decorr_fx.ops.rules.power import Moments, State, apply_step, gain_of, largest_directions, update_moments

powers = st.sampled_from([0.0, 0.25, 0.5])
dampings = st.sampled_from([1e-2, 0.1, 1.0])
rates = st.sampled_from([0.0, 0.08, 1.0])
exponents = st.sampled_from([0.5, 1.0])
STEPS = 3


@dataclass(frozen=True)
class Drawn:
    """What a step of some stacks starts from: a U, what is remembered, and rows, some of them unused.

    `directions` of U are in use.
    """

    U: Tensor
    scale: Tensor
    trace: Tensor
    x: Tensor
    used: int
    directions: int

    @property
    def sketch(self) -> Tensor:
        return self.scale[..., None] * self.U

    def update(self, dtype: torch.dtype, rate: float) -> tuple[Moments, Moment]:
        gain = torch.ones(len(self.x), dtype=dtype)
        state = State(self.U.to(dtype), self.scale.to(dtype), self.trace.to(dtype), gain)
        steps, count = (torch.full((len(self.x),), number) for number in (STEPS, self.used))
        return update_moments(state, steps, self.x.to(dtype), count, rate, self.directions)

    def step(self, dtype: torch.dtype, rate: float, power: float, damping: float, exponent: float = 0.0) -> State:
        rule = Power(power=power, damping=damping, gain=exponent)
        return apply_step(self.update(dtype, rate)[0], rule, self.directions)

    def running(self, i: int, rate: float) -> Tensor:
        """Return the second moment of stack number i after the step, before it is cut to its rank."""
        return reference.running_moment(self.sketch[i].T @ self.sketch[i], self.x[i, : self.used], STEPS, rate)

    def trace_after(self, i: int, rate: float) -> float:
        """Return the sum of the eigenvalues of all of the second moment after the step."""
        before = torch.diag(self.trace[i].expand(1)).double()
        norms = self.x[i, : self.used].norm(dim=1)[:, None]
        return float(reference.running_moment(before, norms, STEPS, rate))


@st.composite
def drawn(draw: st.DrawFn) -> Drawn:
    stacks, d = draw(st.integers(1, 5)), draw(st.integers(1, 20))
    rank = draw(st.integers(1, d))
    used, unused = draw(st.integers(1, 12)), draw(st.integers(0, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    options = {"generator": generator, "dtype": torch.float64}
    directions = torch.linalg.qr(torch.randn(stacks, d, d, **options))[0][:, :rank]
    U = 0.9 * torch.rand(stacks, rank, 1, **options) * directions
    scale = 2 * torch.rand(stacks, rank, **options)
    trace = 1.5 * (scale[..., None] * U).square().sum((1, 2))
    x = draw(st.sampled_from([0.1, 1.0, 10.0])) * torch.randn(stacks, used + unused, d, **options)
    x[:, used:] = 0
    return Drawn(U, scale, trace, x, used, draw(st.integers(1, rank)))


@given(drawn(), rates, powers, dampings)
@settings(max_examples=300)
def test_float32_R_agrees_with_the_float64_reference(d: Drawn, rate: float, power: float, damping: float) -> None:
    """With all directions, and with the largest few in use."""
    for directions in (d.U.shape[1], d.directions):
        U = replace(d, directions=directions).step(torch.float32, rate, power, damping).U
        for i in range(len(U)):
            expected = reference.shrinking(d.running(i, rate), d.trace_after(i, rate), directions, power, damping)
            assert relative(dense_R(U[i, -directions:].double()), expected) < 1e-3


@given(drawn(), rates)
@settings(max_examples=200)
def test_the_sketch_is_the_second_moment_cut_to_its_rank(d: Drawn, rate: float) -> None:
    """However many directions are in use."""
    sketch, trace = d.update(torch.float64, rate)[0]
    for i in range(len(sketch)):
        assert relative(sketch[i].T @ sketch[i], reference.truncated(d.running(i, rate), sketch.shape[1])) < 1e-9
        assert float(trace[i]) == pytest.approx(d.trace_after(i, rate))
        gram = sketch[i] @ sketch[i].T
        assert relative(gram, torch.diag(gram.diagonal())) < 1e-7


@given(drawn(), rates)
@settings(max_examples=100)
def test_z_is_measured_as_it_was_before_the_step(d: Drawn, rate: float) -> None:
    """By the directions that were in use."""
    of_z = d.update(torch.float64, rate)[1]
    for i in range(len(d.x)):
        z = reference.decorrelate_rows(d.x[i, : d.used], dense_R(d.U[i, -d.directions :]))
        assert float(of_z.correlation()[i]) == pytest.approx(reference.correlation_loss(z), rel=1e-8, abs=1e-12)
        assert float(of_z.variance_error()[i]) == pytest.approx(reference.variance_loss(z), rel=1e-8)


@given(drawn(), rates, st.sampled_from([0.1, 0.25, 0.5]), dampings)
@settings(max_examples=200)
def test_the_new_U_scaled_is_the_sketch(d: Drawn, rate: float, power: float, damping: float) -> None:
    """Which nothing else holds: the next step goes on from it."""
    sketch, state = d.update(torch.float32, rate)[0].sketch, d.step(torch.float32, rate, power, damping)
    torch.testing.assert_close(state.scale[..., None] * state.U, sketch, rtol=1e-6, atol=0)


@given(drawn(), rates, dampings)
@settings(max_examples=100)
def test_a_power_of_zero_never_shrinks(d: Drawn, rate: float, damping: float) -> None:
    state = d.step(torch.float32, rate, 0.0, damping)
    assert not state.U.any() and not state.scale.any()


def whole_moment(d: Drawn, moments: Moments, i: int) -> Tensor:
    """Return a second moment with the sketch of stack number i and its trace: the rest lies in all other directions."""
    B, n = moments.sketch[i], moments.sketch.shape[2]
    Q = torch.linalg.qr(torch.cat([B, torch.randn(n, n, dtype=B.dtype)]).mT)[0]
    others = Q[:, len(B) :]
    rest = (moments.trace[i] - B.square().sum()) / others.shape[1]
    return B.T @ B + rest * others @ others.T


@given(drawn(), rates, st.sampled_from([0.1, 0.25, 0.5]), dampings, exponents)
@settings(max_examples=200)
def test_the_gain_agrees_with_the_reference(
    d: Drawn, rate: float, power: float, damping: float, exponent: float
) -> None:
    if d.U.shape[1] == d.U.shape[2]:
        return  # nothing is left out of such a sketch
    (moments, _), state = d.update(torch.float64, rate), d.step(torch.float64, rate, power, damping, exponent)
    for i in range(len(d.x)):
        Sigma, R = whole_moment(d, moments, i), dense_R(state.U[i, -d.directions :])
        assert float(state.gain[i]) == pytest.approx(float(reference.gain(Sigma, R, exponent)), rel=1e-6)
        if exponent == 1:
            R = state.gain[i] * R
            assert float(torch.trace(R @ Sigma @ R)) == pytest.approx(float(torch.trace(Sigma)))


def test_the_gain_is_1_where_it_is_not_asked_for_or_nothing_came() -> None:
    sketch, U = torch.randn(2, 3, 5), 0.1 * torch.randn(2, 3, 5)
    trace = sketch.square().sum((1, 2))
    assert gain_of(sketch, U, trace, 0.0, 3).tolist() == [1, 1]
    zeros = torch.zeros(2, 3, 5)
    assert gain_of(zeros, zeros, torch.zeros(2), 1.0, 3).tolist() == [1, 1]
    assert (gain_of(sketch, U, trace, 1.0, 3) > 1).all()


@pytest.mark.parametrize(("d", "used"), [(6, 6), (40, 8), (40, 3)])
def test_R_of_white_inputs_is_the_identity(d: int, used: int) -> None:
    sketch = torch.linalg.qr(torch.randn(1, d, d, dtype=torch.float64))[0][:, : min(d, 8)]
    state = apply_step(Moments(sketch, torch.full((1,), float(d), dtype=torch.float64)), Power(), used)
    R = state.gain[0] * dense_R(state.U[0, -used:])
    torch.testing.assert_close(R, torch.eye(d, dtype=torch.float64), rtol=0, atol=1e-6)


def shrinking_U(sketch: Tensor, mean: float, power: float, damping: float) -> Tensor:
    """Return U for a sketch `[stacks, rank, d]` of rows with this mean eigenvalue."""
    trace = torch.full((len(sketch),), mean * sketch.shape[2], dtype=sketch.dtype)
    return apply_step(Moments(sketch, trace), Power(power=power, damping=damping), sketch.shape[1]).U


def test_R_of_full_rank_and_power_one_half_whitens_what_is_far_above_the_damping() -> None:
    """Checked by what whitening is: the second moment of z is the same in all directions."""
    rows = torch.randn(50, 6, dtype=torch.float64) @ (torch.eye(6) + 0.2 * torch.ones(6, 6)).double()
    mean = float(torch.trace(reference.measure(rows).M)) / 6
    sketch = largest_directions(rows[None] / 50**0.5, 6)
    z = rows @ dense_R(shrinking_U(sketch, mean, 0.5, 6e-9)[0])
    M = reference.measure(z).M
    assert relative(M / M[0, 0], torch.eye(6, dtype=torch.float64)) < 1e-4


@given(st.integers(1, 12), powers, dampings, st.integers(0, 1000))
@settings(max_examples=200)
def test_U_is_made_of_sketch_and_trace_alone_however_far_apart_eigenvalues_are(
    rank: int, power: float, damping: float, seed: int
) -> None:
    """In float32, from a sketch as other ranks receive it."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(20, rank, generator=generator, dtype=torch.float64))[0].mT
    sketch = 10 ** torch.empty(rank, 1, dtype=torch.float64).uniform_(-8, 4, generator=generator) * directions
    mean = 1.5 * float(sketch.square().sum()) / 20
    U = shrinking_U(sketch.float()[None], mean, power, damping)[0]
    expected = reference.shrinking(sketch.T @ sketch, 20 * mean, rank, power, damping)
    assert relative(dense_R(U.double()), expected) < 1e-6


@pytest.mark.parametrize("d", [3, 30], ids=["more rows than features", "fewer"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_rows_that_are_not_finite_spoil_neither_the_call_nor_their_neighbours(value: float, d: int) -> None:
    good = torch.randn(4, d)
    sketch = largest_directions(torch.stack([torch.full((4, d), value), good]), min(4, d))
    assert not sketch[0].isfinite().any()
    torch.testing.assert_close(sketch[1].T @ sketch[1], good.T @ good)


@pytest.mark.parametrize("shape", [(96, 200), (300, 96)], ids=["fewer rows than features", "more"])
def test_directions_are_found_where_some_rows_or_features_are_zero(shape: tuple[int, int]) -> None:
    """As of padding, and of dead units: LAPACK alone finds none for every tenth of such matrices."""
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        kept = (torch.randperm(96, generator=generator) < 10).float()
        rows = torch.randn(1, *shape, generator=generator) * (kept[:, None] if shape[0] == 96 else kept)
        sketch = largest_directions(rows, 16)[0]
        assert relative(sketch.T @ sketch, rows[0].T @ rows[0]) < 1e-4


def test_directions_that_are_not_found_cost_a_step_of_R_and_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def eigh(M: Tensor) -> tuple[Tensor, Tensor]:
        raise torch.linalg.LinAlgError("linalg.eigh: the algorithm failed to converge")

    monkeypatch.setattr("torch.linalg.eigh", eigh)
    assert largest_directions(torch.randn(1, 5, 20), 4).isnan().all()  # what is not finite is refused


def test_rows_of_zeros_leave_R_at_the_identity() -> None:
    sketch = largest_directions(torch.zeros(1, 9, 3), 3)
    assert not shrinking_U(sketch, 0.0, 0.5, 0.3).any()


def test_the_first_steps_take_the_plain_mean_of_all_rows_so_far() -> None:
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    state = State(*(torch.zeros(*shape, dtype=torch.float64) for shape in ((1, 3, 3), (1, 3), (1,), (1,))))
    for i, rows in enumerate(x):
        moments, _ = update_moments(state, torch.tensor([i]), rows[None], torch.tensor([5]), 0.1, 3)
        state = apply_step(moments, Power(power=0.5, damping=0.1), 3)
    torch.testing.assert_close(moments.sketch[0].T @ moments.sketch[0], reference.measure(x.flatten(0, 1)).M)


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
