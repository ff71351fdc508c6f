"""What a graph would lose without an error is found; such a forward runs as it is, on W R."""

import copy
import random
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import ReadsItsChild
from torch import Tensor, nn
from torch.nn.utils import parametrize

import decorr_fx
from decorr_fx.passes.capture.code import parameters_in_forward
from decorr_fx.passes.capture.trace import trace_model


class Straight(torch.autograd.Function):
    """Rounds, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad


def custom_backward(self: nn.Module, x: Tensor) -> Tensor:
    return F.linear(Straight.apply(x), self.weight)


def without_gradient(self: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return F.linear(x, self.weight)


def without_autocast(self: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.linear(x, self.weight)


def counting(self: nn.Module, x: Tensor) -> Tensor:
    self.calls += 1
    return F.linear(x, self.weight)


def counting_in_a_buffer(self: nn.Module, x: Tensor) -> Tensor:
    self.count += 1
    return F.linear(x, self.weight)


def remembering(self: nn.Module, x: Tensor) -> Tensor:
    self.last = F.linear(x, self.weight)
    return self.last


def chance(self: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, self.weight) * (0.0 if random.random() < 0.5 else 1.0)


def noisy(self: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, self.weight * (1 + torch.randn(4, 4)))


def constant(self: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, self.weight * torch.tensor(0.5))


def asks_for_type(self: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x if isinstance(x, Tensor) else x[0], self.weight)


def optional_output(self: nn.Module, x: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return F.linear(x, self.weight), x if other is None else other


def optional_pair(self: nn.Module, x: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    y = F.linear(x, self.weight)
    return y * 2 if a is not None and b is None else y


def numpy_chance(self: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, self.weight) * float(np.random.rand())


def catches(self: nn.Module, x: Tensor) -> Tensor:
    try:
        flip = bool(x.sum() > 0)
    except Exception:
        flip = False
    return F.linear(-x if flip else x, self.weight)


def logging_in_a_list(self: nn.Module, x: Tensor) -> Tensor:
    self.log.append(1)
    return F.linear(x, self.weight)


def _is_tensor(x: object) -> bool:
    return isinstance(x, Tensor)


def asks_in_a_helper(self: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x if _is_tensor(x) else x[0], self.weight)


def asks_in_a_generator(self: nn.Module, *xs: Tensor) -> Tensor:
    return F.linear(xs[0] if all(isinstance(x, Tensor) for x in xs) else -xs[0], self.weight)


def asks_for_the_mode(self: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, self.weight) * (1 if torch.is_grad_enabled() else 2)


def scaled_by_plain_tensor(self: nn.Module, x: Tensor) -> Tensor:
    self.scale += 1
    return F.linear(x, self.weight) * self.scale


REFUSED = {
    custom_backward: "a backward of its own",
    without_gradient: "changes the grad mode",
    without_autocast: "or autocast",
    counting: r"sets attributes or makes constants \(calls\)",
    counting_in_a_buffer: r"count|cannot assign",
    remembering: r"\(last\)",
    chance: "draws random numbers",
    noisy: "draws random numbers|_tensor_constant",
    constant: "_tensor_constant",
    asks_for_type: r"asks for types or modes \(isinstance\)",
    asks_in_a_helper: "asks for types",
    asks_in_a_generator: "asks for types",
    asks_for_the_mode: "is_grad_enabled",
    numpy_chance: "draws random numbers",
    catches: "branches on a value",
    logging_in_a_list: "log",
    optional_output: "whether other is given",
    optional_pair: "whether b is given|whether a is given",
}


def module_with(forward: Callable[..., object]) -> nn.Module:
    cls = type("Module", (nn.Module,), {"forward": forward})
    module = cls()
    module.weight = nn.Parameter(torch.randn(4, 4))
    module.calls = 0
    module.log = []
    module.scale = torch.ones(4)
    module.register_buffer("count", torch.zeros(()))
    return module


@pytest.mark.parametrize("forward", REFUSED, ids=lambda f: f.__name__)
def test_a_forward_that_a_graph_would_change_runs_as_it_is(forward: Callable[..., object]) -> None:
    plain = nn.ModuleDict({"it": module_with(forward), "site": nn.Linear(4, 4)})
    before = copy.deepcopy(plain.state_dict())
    state = random.getstate(), torch.get_rng_state()
    assert re.search(REFUSED[forward], trace_model(plain).glimpses["it"].reason)
    model = decorr_fx.transform(plain)
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])
    assert decorr_fx.report(model).skipped == ()
    assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items())


def seeded(module: nn.Module, x: Tensor) -> Tensor:
    """Call the module as often from the same state of all random generators."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    out = module(x)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("forward", REFUSED, ids=lambda f: f.__name__)
def test_a_forward_that_runs_as_it_is_learns_and_folds(forward: Callable[..., object]) -> None:
    plain, x = module_with(forward), torch.randn(9, 4)
    expected = seeded(copy.deepcopy(plain), x)
    model = decorr_fx.transform(plain)
    got = seeded(model, x)
    torch.testing.assert_close(got, expected)
    if got.requires_grad:
        got.square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    assert [(s.steps, s.refused) for s in decorr_fx.stats(model)] == [(1, 0)]
    folded = decorr_fx.fold(model)
    assert type(folded) is type(plain)
    assert not any("decorr" in name for name in (*folded.state_dict(), *vars(folded)))
    torch.testing.assert_close(seeded(folded.eval(), x), seeded(model.eval(), x))
    assert (folded.weight - model.weight).norm() > 1e-4  # R did something


def test_tracing_does_not_change_plain_tensors_of_the_model() -> None:
    plain = nn.ModuleDict({"it": module_with(scaled_by_plain_tensor), "site": nn.Linear(4, 4)})
    decorr_fx.report(plain)
    decorr_fx.transform(plain)
    assert torch.equal(plain["it"].scale, torch.ones(4))


def test_a_replaced_forward_and_a_graph_module_are_left_alone() -> None:
    plain = nn.ModuleDict({"it": nn.Linear(4, 4), "site": nn.Linear(4, 4)})
    plain["it"].forward = lambda x: x
    (skipped,) = decorr_fx.report(plain).skipped
    assert "replaced on the instance" in skipped.reason
    traced = torch.fx.symbolic_trace(module_with(lambda self, x: F.linear(x, self.weight)))
    (skipped,) = decorr_fx.report(nn.ModuleDict({"it": traced, "site": nn.Linear(4, 4)})).skipped
    assert "it is a GraphModule" in skipped.reason


def test_a_child_s_weight_is_the_same_to_its_own_forward_and_to_its_parent_s() -> None:
    plain, x = ReadsItsChild(), torch.randn(30, 6)
    model = decorr_fx.transform(plain)
    assert [site.fqn for site in decorr_fx.report(model).sites] == ["body", "head.0"]
    model(x).square().mean().backward()
    reference = copy.deepcopy(plain).requires_grad_()
    reference.zero_grad()
    reference(x).square().mean().backward()
    torch.testing.assert_close(model.body.weight.grad, reference.body.weight.grad)
    assert model.body.weight_decorr.seen == 60  # by its own call and by its parent's, each once
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    torch.testing.assert_close(decorr_fx.fold(model)(x), model(x))
    torch.testing.assert_close(model.body(x), decorr_fx.fold(model).body(x))


def test_how_an_untraceable_forward_reads_a_weight() -> None:
    def read_by(forward: Callable[..., object]) -> set[str]:
        module = type(
            "Root", (nn.Module,), {"forward": forward, "helper": lambda self, x: F.linear(x, self.q.weight)}
        )()
        module.q, module.k = nn.Linear(4, 4), nn.Linear(4, 4)
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        return {names[id(parameter)] for parameter in parameters_in_forward(module)}

    every = {"q.weight", "q.bias", "k.weight", "k.bias"}
    assert read_by(lambda self, x: self.q(x)) == set()
    assert read_by(lambda self, x: x.to(self.q.weight.dtype)) == set()
    assert read_by(lambda self, x: F.linear(x, self.q.weight)) == {"q.weight"}
    assert read_by(lambda self, x: self.helper(x)) == {"q.weight"}
    assert read_by(lambda self, x: [F.linear(x, layer.weight) for layer in (self.q, self.k)]) == every
    assert read_by(lambda self, x: x + self.k.bias) == {"k.bias"}


def test_reading_the_type_or_shape_of_a_weight_does_no_harm() -> None:
    class Typed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(4, 4)
            self.w = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.q(x.to(self.q.weight.dtype)), self.w).view(-1, self.q.weight.shape[0])

    assert len(decorr_fx.report(Typed()).sites) == 2


def test_random_generators_stand_still_also_where_tracing_fails() -> None:
    def fails(self: nn.Module, x: Tensor) -> Tensor:
        return F.linear(x + torch.randn(4), self.weight) if x.sum() > random.random() else x

    plain = nn.ModuleDict({"it": module_with(fails), "site": nn.Linear(4, 4)})
    state = random.getstate(), torch.get_rng_state()
    decorr_fx.transform(plain)
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])


def test_weights_in_a_container_are_sites() -> None:
    class Lists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ws = nn.ParameterList([torch.randn(4, 4), torch.randn(4, 4)])

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.ws[0]), self.ws[1])

    model = decorr_fx.transform(Lists())
    assert [site.fqn for site in decorr_fx.report(model).sites] == ["ws.0", "ws.1"]
    x = torch.randn(7, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(x).square().mean().backward()
    optimizer.step()
    torch.testing.assert_close(decorr_fx.fold(model)(x), model(x))


def test_a_user_s_module_with_a_parametrization_is_seen() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    module = module_with(lambda self, x: F.linear(x, self.weight))
    parametrize.register_parametrization(module, "weight", Doubled())
    assert len(decorr_fx.report(module).sites) == 1
