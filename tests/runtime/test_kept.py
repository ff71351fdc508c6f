"""In eval mode W R is kept while W and R stand still, and made anew after any change of either."""

import copy
from collections.abc import Callable

import pytest
import torch
from factors import dense_R
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import decorr_fx
from decorr_fx import DecorrConfig
from decorr_fx.runtime.site.state import Site, sites_of

X = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))


def trained() -> nn.Module:
    """Return a model whose R is not the identity, in eval mode."""
    torch.manual_seed(0)
    model = decorr_fx.transform(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), DecorrConfig(decor_lr=0.1))
    optimize(model)
    return model.eval()


@torch.enable_grad()
def optimize(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(X).square().mean().backward()
    optimizer.step()
    model.eval()


def anew(model: nn.Module) -> Tensor:
    """Return the outputs with nothing kept."""
    return decorr_fx.fold(model)(X)


def site_of(model: nn.Module) -> Site:
    return next(sites_of(model))


def flops(model: nn.Module) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(X)
    return counter.get_total_flops()


def test_the_second_evaluation_takes_what_the_plain_model_takes() -> None:
    model = trained()
    plain = flops(decorr_fx.fold(model))
    assert flops(model) > plain
    assert flops(model) == plain


@torch.no_grad()
def scale_weight(model: nn.Module) -> None:
    model[0].weight.mul_(2)


@torch.no_grad()
def scale_R(model: nn.Module) -> None:
    site_of(model).V.mul_(0.5)


@torch.no_grad()
def write_into_a_view(model: nn.Module) -> None:
    model[0].weight[1].fill_(1)


def write_past_the_counter(model: nn.Module) -> None:
    model[0].weight.data.mul_(2)
    model.eval()  # which is what makes it seen


def set_data(model: nn.Module) -> None:
    model[0].weight.data = torch.ones(5, 6)


def set_parameter(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(torch.ones(5, 6))


def load(model: nn.Module) -> None:
    model.load_state_dict({k: 0.5 * v if v.is_floating_point() else v for k, v in model.state_dict().items()})


def assign(model: nn.Module) -> None:
    model.load_state_dict({"0.weight": torch.ones(5, 6)}, strict=False, assign=True)


def cast(model: nn.Module) -> None:
    model.double().float()
    model[0].weight.data.add_(1)
    model.eval()


def step_by_hand(model: nn.Module) -> None:
    model.train()(X)
    decorr_fx.step(model)
    with torch.no_grad():
        model[2].bias.add_(1)
    model.eval()


CHANGES: list[Callable[[nn.Module], None]] = [
    scale_weight, scale_R, write_into_a_view, write_past_the_counter, set_data, set_parameter, load, assign, cast,
    optimize, step_by_hand,
]  # fmt: skip


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("change", CHANGES)
def test_any_change_is_seen(change: Callable[[nn.Module], None], compiled: bool) -> None:
    torch._dynamo.reset()
    model = trained()
    running = torch.compile(model, fullgraph=True) if compiled else model
    with torch.no_grad():
        before = running(X)
        torch.testing.assert_close(before, anew(model))
        for _ in range(2):  # the graph may be compiled anew, and what it keeps may change after that
            change(model)
            with torch.no_grad():
                got = running(X)
            torch.testing.assert_close(got, anew(model))
            torch.testing.assert_close(running(X), got)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_compiled_evaluation_keeps_in_one_graph(mode: Callable[[], object]) -> None:
    torch._dynamo.reset()
    model = trained()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with mode():
        for _ in range(3):
            torch.testing.assert_close(compiled(X), anew(model))
            scale_weight(model)
    assert counter.frame_count == 1


def test_a_compiled_model_is_compiled_once_a_mode_however_often_they_change() -> None:
    torch._dynamo.reset()
    model = trained()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        compiled.train()(X).square().mean().backward()
        optimizer.step()
        compiled.eval()
        with torch.no_grad():
            torch.testing.assert_close(compiled(X), anew(model))
    assert counter.frame_count == 2


def test_modes_may_alternate() -> None:
    model = trained()
    with torch.inference_mode():
        model.eval()
        torch.testing.assert_close(model(X), anew(model))
    scale_weight(model)
    with torch.no_grad():
        torch.testing.assert_close(model(X), anew(model))
    with torch.inference_mode():
        torch.testing.assert_close(model(X), anew(model))


def test_a_gradient_of_the_weight_is_that_of_the_plain_model() -> None:
    model = trained()
    with torch.no_grad():
        model(X)
    model.zero_grad()
    model(X).square().mean().backward()
    site, plain = site_of(model), decorr_fx.fold(model)
    plain.zero_grad()
    plain(X).square().mean().backward()
    torch.testing.assert_close(model[0].weight.grad, plain[0].weight.grad @ dense_R(site.V[0]))


def test_frozen_weights_keep_and_let_the_gradient_of_the_input_through() -> None:
    model = trained().requires_grad_(False)
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    expected = X.clone().requires_grad_()
    decorr_fx.fold(model)(expected).sum().backward()
    torch.testing.assert_close(x.grad, expected.grad)


def test_a_copy_keeps_for_itself() -> None:
    model = trained()
    with torch.no_grad():
        model(X)
        other = copy.deepcopy(model)
        scale_weight(other)
        torch.testing.assert_close(other(X), anew(other))
        torch.testing.assert_close(model(X), anew(model))


def test_functional_calls_and_forward_derivatives_bypass_what_is_kept() -> None:
    model = trained()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    tangents = {name: torch.ones_like(p) for name, p in parameters.items()}

    def outputs(module: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
        return lambda own: torch.func.functional_call(module, own, (X,))

    with torch.no_grad():
        model(X)
        doubled = outputs(model)({name: 2 * p for name, p in parameters.items()})
        assert not torch.allclose(doubled, model(X))
    _, slope = torch.func.jvp(outputs(model), (parameters,), (tangents,))
    epsilon = 1e-3
    ahead, behind = ({n: p + sign * epsilon for n, p in parameters.items()} for sign in (1, -1))
    torch.testing.assert_close(
        slope, (outputs(model)(ahead) - outputs(model)(behind)) / (2 * epsilon), rtol=1e-2, atol=1e-3
    )


def test_room_is_taken_in_eval_mode_only_and_is_no_part_of_a_checkpoint() -> None:
    model = trained()
    assert site_of(model).kept0.shape == (5, 6)
    assert not [key for key in model.state_dict() if "kept" in key]
    assert site_of(model.train()).kept0 is None


def test_a_model_that_is_transformed_in_eval_mode_keeps_at_once() -> None:
    model = decorr_fx.transform(nn.Linear(6, 5).eval())
    assert site_of(model).kept0 is not None
    with torch.no_grad():
        torch.testing.assert_close(model(X), anew(model))
