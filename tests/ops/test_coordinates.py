from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from factors import relative
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import Laid, R, dense_of_group, drawn_R, joined, laid
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from decorr_fx.ops import coordinates, reference
from decorr_fx.ops.coordinates import divided, gradients_to_z, moves_to_x, multiply_into
from decorr_fx.ops.layout import Factored, Layout
from decorr_fx.ops.low_rank import LowRank

TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6}
dtypes = st.sampled_from(list(TOLERANCE))
counts = st.integers(1, 3)


def of_each_group(one: Laid, tensors: list[Tensor]) -> list[list[Tensor]]:
    """Return copies of the rows of all groups of each of the weights, in float64."""
    wide = [tensor.to(torch.float64, copy=True) for tensor in tensors]
    return [[one.rows(tensor, group) for group in range(one.layout.groups)] for tensor in wide]


def drawn(one: Laid, count: int, dtype: torch.dtype, seed: int) -> tuple[list[Tensor], R]:
    """Return so many weights, and the R of all of them."""
    Rs = [drawn_R(one.layout, seed + i, dtype, gain=seed % 2 == 0) for i in range(count)]
    return [one.weight(seed + i, dtype) for i in range(count)], joined(Rs)


def without_gain(R: R) -> R:
    return LowRank(R.U) if isinstance(R, LowRank) else R


def denses(R: R, layout: Layout, count: int) -> list[list[Tensor]]:
    """Return R of each weight and group as one matrix."""
    every = replace(layout, groups=layout.groups * count)
    found = [dense_of_group(R, every, group) for group in range(every.groups)]
    return [found[i * layout.groups : (i + 1) * layout.groups] for i in range(count)]


@given(laid(), counts, dtypes, st.integers(0, 1000))
@settings(max_examples=200)
def test_gradients_become_those_of_W(one: Laid, count: int, dtype: torch.dtype, seed: int) -> None:
    gradients, R = drawn(one, count, dtype, seed)
    before, Rs = of_each_group(one, gradients), denses(without_gain(R), one.layout, count)
    gradients_to_z(gradients, R, one.layout)
    for own, got, matrices in zip(before, of_each_group(one, gradients), Rs, strict=True):
        for g, mapped, matrix in zip(own, got, matrices, strict=True):
            assert relative(mapped, reference.gradient_to_z(g, matrix)) < TOLERANCE[dtype]


@given(laid(), counts, dtypes, st.integers(0, 1000))
@settings(max_examples=200)
def test_moves_of_W_become_those_of_theta(one: Laid, count: int, dtype: torch.dtype, seed: int) -> None:
    weights, R = drawn(one, count, dtype, seed)
    old_rows, olds = of_each_group(one, weights), [*map(Tensor.clone, weights)]
    for i, weight in enumerate(weights):
        weight += 0.1 * one.weight(seed + 10 + i, dtype)
    moved_rows, versions = of_each_group(one, weights), [weight._version for weight in weights]
    moves_to_x(weights, olds, R, one.layout)
    assert [weight._version for weight in weights] == [version + 1 for version in versions]  # seen before or after
    Rs = denses(R, one.layout, count)
    for *parts, matrices in zip(old_rows, moved_rows, of_each_group(one, weights), Rs, strict=True):
        for old, moved, got, matrix in zip(*parts, matrices, strict=True):
            assert relative(got, reference.move_to_x(old, moved, matrix)) < TOLERANCE[dtype]


def nearest(got: Tensor, exact: Tensor) -> bool:
    """Tell whether each bfloat16 number is one that is nearest to the exact one, but for float32's own rounding."""
    _, exponent = torch.frexp(torch.maximum(exact.abs(), got.double().abs()))
    half_a_step = torch.ldexp(torch.ones_like(exact), exponent - 9)  # 8 bits, the first of them 1/2
    allowed = half_a_step + 1e-5 * exact.abs().max()
    return bool(((got.double() - exact).abs() <= allowed).all())


@given(laid(), counts, st.integers(0, 1000))
@settings(max_examples=100)
def test_bfloat16_is_rounded_once(one: Laid, count: int, seed: int) -> None:
    """With R of float32, as a site keeps it."""
    _, R = drawn(one, count, torch.float32, seed)
    gradients, weights = ([one.weight(seed + k + i, torch.bfloat16) for i in range(count)] for k in (20, 30))
    olds, before = [*map(Tensor.clone, weights)], [of_each_group(one, tensors) for tensors in (gradients, weights)]
    for weight, gradient in zip(weights, gradients, strict=True):
        weight += 0.05 * gradient
    before.append(of_each_group(one, weights))
    gradients_to_z(gradients, R, one.layout)
    moves_to_x(weights, olds, R, one.layout)
    assert all(tensor.dtype == torch.bfloat16 for tensor in (*gradients, *weights))
    after = [of_each_group(one, tensors) for tensors in (gradients, weights)]
    for i, pair in enumerate(
        zip(denses(R, one.layout, count), denses(without_gain(R), one.layout, count), strict=True)
    ):
        for group, (matrix, unscaled) in enumerate(zip(*pair, strict=True)):
            g, old, moved, mapped, got = (of[i][group] for of in (*before, *after))
            assert nearest(mapped, reference.gradient_to_z(g, unscaled))
            assert nearest(got, reference.move_to_x(old, moved, matrix))


def held_in(weight: Tensor, how: str) -> tuple[Tensor, Tensor]:
    """Return a tensor of the same numbers that is a part of a larger one or lies otherwise, and the larger one."""
    if how == "rows of a packed weight":
        packed = torch.full((len(weight) + 5, *weight.shape[1:]), 7.0, dtype=weight.dtype)
        packed[2 : 2 + len(weight)] = weight
        return packed[2 : 2 + len(weight)], packed
    if how == "every second row":
        packed = torch.full((2 * len(weight), *weight.shape[1:]), 7.0, dtype=weight.dtype)
        packed[::2] = weight
        return packed[::2], packed
    packed = weight.movedim(1, -1).contiguous().movedim(-1, 1)  # channels_last, of any number of dimensions
    return packed, packed


@given(laid(), counts, st.sampled_from(["rows of a packed weight", "every second row", "channels_last"]))
@settings(max_examples=150)
def test_weights_may_be_parts_of_others_and_lie_in_any_order(one: Laid, count: int, how: str) -> None:
    expected, R = drawn(one, count, torch.float64, 1)
    held, packed = zip(*(held_in(tensor, how) for tensor in expected), strict=True)
    gradients_to_z(expected, R, one.layout)
    gradients_to_z(held, R, one.layout)
    torch.testing.assert_close(list(held), expected, rtol=1e-13, atol=1e-13)
    for weights in (expected, held):
        olds = [*map(Tensor.clone, weights)]
        for weight in weights:
            weight *= 1.5
        moves_to_x(weights, olds, R, one.layout)
    torch.testing.assert_close(list(held), expected, rtol=1e-13, atol=1e-13)
    if how != "channels_last":  # nothing else was touched
        assert all(
            int((whole == 7).sum()) == whole.numel() - part.numel() for whole, part in zip(packed, held, strict=True)
        )


def test_the_gradient_of_one_linear_is_mapped_where_it_lies() -> None:
    """Without another tensor as large: the product with U alone is made."""
    gradient, U = torch.randn(5, 40), 0.1 * torch.randn(1, 3, 40)
    pointer, layout = gradient.data_ptr(), Layout(1, 5, 40, rank=3)
    seen: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in (pointer, U.data_ptr()):
                seen.append(result.numel())
            return result

    with Sizes():
        gradients_to_z([gradient], LowRank(U), layout)
    assert seen and max(seen) == 5 * 3


@given(laid(), dtypes, st.integers(0, 1000))
@settings(max_examples=150)
def test_theta_follows_where_W_stands_still(one: Laid, dtype: torch.dtype, seed: int) -> None:
    """As `preserve_function=False` has it."""
    theta, old, new = one.weight(seed, dtype), drawn_R(one.layout, seed, dtype), drawn_R(one.layout, seed + 1, dtype)
    (before,) = of_each_group(one, [theta])
    W = divided(theta, old, one.layout)
    multiply_into(theta, W, new, one.layout)
    (after,) = of_each_group(one, [theta])
    for group, (had, got) in enumerate(zip(before, after, strict=True)):
        expected = reference.follow(had, *(dense_of_group(R, one.layout, group) for R in (old, new)))
        assert relative(got, expected) < 100 * TOLERANCE[dtype]  # of matrices that are inverted


def test_bfloat16_follows_with_one_rounding() -> None:
    layout, theta = Layout(1, 6, 9, rank=4), torch.randn(6, 9, dtype=torch.bfloat16)
    old, new = (drawn_R(layout, seed, torch.float32) for seed in (0, 1))
    expected = reference.follow(theta.double(), *(dense_of_group(R, layout, 0) for R in (old, new)))
    multiply_into(theta, divided(theta, old, layout), new, layout)
    assert nearest(theta, expected)


# The folded form: training theta around a plain optimizer is training W with `W R` in the forward.

MOVES, STEPS = (2, 3, 6), 9  # R moves after these steps
DECAY, LR = 0.1, 0.05


def timms_muon(parameters: list[Tensor], **options: float) -> Optimizer:
    return pytest.importorskip("timm.optim").Muon(parameters, momentum=0.9, nesterov=True, **options)


momentum = partial(torch.optim.SGD, momentum=0.9, lr=LR)
nesterov = partial(momentum, nesterov=True)
adam = partial(torch.optim.Adam, lr=LR)
muons = {"timm": partial(timms_muon, lr=LR), "torch": partial(torch.optim.Muon, lr=LR)}
# An optimizer, and how it lets weights decay: not at all, by a penalty in the gradient, or apart from it.
OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], str]] = {
    "momentum": (momentum, "none"),
    "nesterov": (nesterov, "none"),
    "nesterov with a penalty": (nesterov, "penalty"),
    "adam": (adam, "none"),
    "adam with a penalty": (adam, "penalty"),
    "adamw": (partial(torch.optim.AdamW, lr=LR), "decoupled"),
    **{f"muon of {name}": (muon, "none") for name, muon in muons.items()},
    **{f"muon of {name} with decay": (muon, "decoupled") for name, muon in muons.items()},
}


class Problem:
    """A linear or a conv by its rows `[o, d]`, data that it is to fit, and the R that it has after each move."""

    def __init__(self, kind: str) -> None:
        options = {"generator": torch.Generator().manual_seed(3), "dtype": torch.float64}
        self.shape = (7, 10) if kind == "linear" else (6, 3, 2, 2)
        self.start = torch.randn(self.shape, **options).flatten(1)
        self.x = torch.randn(20, *((10,) if kind == "linear" else (3, 6, 5)), **options)
        self.target = torch.randn(20, 7 if kind == "linear" else 6, **options)
        d = self.start.shape[1]
        noise = [torch.randn(d, d, **options) for _ in MOVES]
        self.Rs = [torch.eye(d, dtype=torch.float64), *(torch.eye(d) + 0.5 * one / d**0.5 for one in noise)]

    def loss(self, theta: Tensor, step: int) -> Tensor:
        """Return the loss of one batch."""
        x, target = (tensor[step % 2 :: 2] for tensor in (self.x, self.target))
        if len(self.shape) == 2:
            return (F.linear(x, theta).tanh() - target).square().sum(1).mean()
        return (F.conv2d(x, theta.reshape(self.shape), stride=2).tanh().mean((2, 3)) - target).square().sum(1).mean()


def trained_folded(problem: Problem, make: Callable[..., Optimizer], decay: float) -> list[Tensor]:
    """Return theta after each step: what the library does."""
    theta, R = nn.Parameter(problem.start.clone()), problem.Rs[0]
    optimizer, found = make([theta], weight_decay=decay), []
    for step in range(STEPS):
        (gradient,) = torch.autograd.grad(problem.loss(theta, step), theta)
        theta.grad = reference.gradient_to_z(gradient, R)
        old = theta.detach().clone()
        optimizer.step()
        theta.data = reference.move_to_x(old, theta.detach(), R)
        if step in MOVES:
            R = problem.Rs[1 + MOVES.index(step)]
        found.append(theta.detach().clone())
    return found


def trained_in_W(problem: Problem, make: Callable[..., Optimizer], decay: float, kind: str) -> list[Tensor]:
    """Return W R after each step, where W is trained through `W R` in the forward, and follows moves of R.

    What decays is the weight of the network, `W R`: so the decay is that in coordinates of W.
    """
    W, R = nn.Parameter(problem.start.clone()), problem.Rs[0]
    optimizer, found = make([W], weight_decay=0.0), []
    for step in range(STEPS):
        optimizer.zero_grad()
        problem.loss(reference.theta_of(W, R), step).backward()
        theta = reference.theta_of(W.detach(), R)
        if kind == "penalty":
            W.grad += decay * theta
        optimizer.step()
        if kind == "decoupled":
            W.data -= LR * decay * theta
        found.append(reference.theta_of(W.detach(), R))
        if step in MOVES:
            R, R_old = problem.Rs[1 + MOVES.index(step)], R
            W.data = reference.preserve(W.detach(), R_old, R)
            torch.testing.assert_close(reference.theta_of(W.detach(), R), found[-1], rtol=1e-13, atol=1e-13)
    return found


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_folded_form_is_training_W_with_W_R_in_the_forward(name: str, kind: str) -> None:
    make, decays = OPTIMIZERS[name]
    problem, decay = Problem(kind), 0.0 if decays == "none" else DECAY
    folded = trained_folded(problem, make, decay)
    in_W = trained_in_W(problem, make, decay, decays)
    assert max(relative(got, expected) for got, expected in zip(folded, in_W, strict=True)) < 1e-12
    problem.Rs[1:] = [problem.Rs[0]] * len(MOVES)
    plain = trained_folded(problem, make, decay)
    assert relative(folded[-1], plain[-1]) > 1e-2  # than which it is another path


@pytest.mark.parametrize("R", [LowRank(0.3 * torch.randn(1, 2, 6)), Factored([torch.randn(1, 6, 6)])])
def test_a_weight_that_stands_still_stays_as_it_is_to_the_last_digit(R: R) -> None:
    weight, layout = torch.randn(4, 6), Layout(1, 4, 6, rank=2 if isinstance(R, LowRank) else 0)
    before = weight.clone()
    moves_to_x([weight], [weight.clone()], R, layout)
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    "R", [LowRank(0.3 * torch.randn(1, 4, 48) / 7, torch.tensor([1.7])), Factored([torch.randn(1, 48, 48)])]
)
def test_weights_larger_than_a_cache_are_moved_row_by_row(R: R, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, weight = Layout(1, 50, 48, rank=4 if isinstance(R, LowRank) else 0), torch.randn(50, 48)
    old, whole = torch.randn(50, 48), weight.clone()
    moves_to_x([whole], [old], R, layout)
    monkeypatch.setattr(coordinates, "CACHED", 7 * 48)
    moves_to_x([weight], [old], R, layout)
    torch.testing.assert_close(weight, whole)
