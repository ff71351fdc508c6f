"""Low precision, memory formats, and what CUDA graphs need: R and its statistics stay in float32, where they are."""

import copy
from itertools import cycle, islice

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import decorr_fx
from decorr_fx import Dbp, Power, Rule
from decorr_fx.runtime.site.state import sites_of

RULE = Power(update_every=2)
HALVES = [torch.bfloat16, torch.float16]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(200, 4),
    )


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = [0.5 + torch.randn(16, 3, 5, 5, generator=generator) for _ in range(count)]
    return [(x, x[:, 0].flatten(1).sum(1).argsort().argsort() // 4) for x in images]


def losses(model: nn.Module, count: int, dtype: torch.dtype | None = None, scaled: bool = False) -> list[float]:
    """Train under autocast to a type; return the losses."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, eps=1e-4)
    scaler, found = torch.amp.GradScaler("cpu", enabled=scaled), []
    for x, y in islice(cycle(batches(4)), count):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            logits = model(x.to(next(model.parameters()).dtype))
        loss = F.cross_entropy(logits.float(), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        found.append(loss.item())
    return found


def check_R(model: nn.Module) -> None:
    for site in sites_of(model):
        assert site.steps > 0 and site.refused == 0
        for name, buffer in site.state_dict().items():
            if isinstance(buffer, Tensor) and buffer.is_floating_point():
                assert buffer.dtype == torch.float32 and buffer.isfinite().all(), name


def mean_of_last(values: list[float]) -> float:
    return sum(values[-10:]) / 10


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_with_a_grad_scaler_learns_what_float32_learns(dtype: torch.dtype) -> None:
    expected = losses(decorr_fx.transform(network(), RULE), 24)
    model = decorr_fx.transform(network(), RULE)
    found = losses(model, 24, dtype, scaled=dtype == torch.float16)
    check_R(model)
    assert mean_of_last(found) == pytest.approx(mean_of_last(expected), rel=0.15)
    assert mean_of_last(found) < 0.7 * found[0]


@pytest.mark.parametrize("dtype", HALVES)
def test_weights_in_half_precision_learn_with_R_in_float32(dtype: torch.dtype) -> None:
    model = decorr_fx.transform(network(), RULE).to(dtype)
    found = losses(model, 60)
    check_R(model)
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    assert mean_of_last(found) < 0.7 * found[0]
    x = batches(1)[0][0].to(dtype)
    assert torch.equal(decorr_fx.fold(model)(x), model(x))


@pytest.mark.parametrize("dtype", HALVES)
def test_R_that_moves_leaves_weights_in_half_precision_as_they_are(dtype: torch.dtype) -> None:
    model = decorr_fx.transform(network(), RULE).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    for images, _ in batches(20):
        optimizer.zero_grad()
        model(images.to(dtype)).float().mean().backward()
        optimizer.step()
    check_R(model)
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_and_moves_in_half_precision_are_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    wide = decorr_fx.transform(nn.Linear(24, 8), Power(update_every=1))
    x = torch.randn(300, 24) @ torch.randn(24, 24) / 4
    wide(x).square().mean().backward()
    with decorr_fx.stepping(wide):
        pass
    half = copy.deepcopy(wide).to(dtype)
    gradient, move = torch.randn(8, 24).to(dtype), 0.1 * torch.randn(8, 24).to(dtype)
    with torch.no_grad():
        wide.weight.copy_(half.weight)
    for model in (wide, half):
        model.weight.grad = gradient.to(model.weight.dtype)
        with decorr_fx.stepping(model), torch.no_grad():
            model.weight += move.to(model.weight.dtype)
    eps = torch.finfo(dtype).eps
    assert (half.weight.grad.float() - wide.weight.grad).abs().max() <= eps * wide.weight.grad.abs().max()
    assert (half.weight.float() - wide.weight).abs().max() <= 2 * eps * wide.weight.abs().max()  # with that of the move


@pytest.mark.parametrize("rule", [RULE, Dbp(structure="kronecker")], ids=["Power", "Dbp"])
def test_channels_last_stays_and_computes_the_same(rule: Rule) -> None:
    contiguous = decorr_fx.transform(network()[:4], rule)
    last = decorr_fx.transform(network()[:4].to(memory_format=torch.channels_last), rule)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (contiguous, last)]
    for x, _ in batches(6):
        out = contiguous(x), last(x.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(*out, rtol=1e-4, atol=1e-5)
        assert out[1].is_contiguous(memory_format=torch.channels_last)
        for output, optimizer in zip(out, optimizers, strict=True):
            optimizer.zero_grad()
            output.square().mean().backward()
            optimizer.step()
    assert last[2].weight.is_contiguous(memory_format=torch.channels_last)
    assert decorr_fx.fold(last)[2].weight.is_contiguous(memory_format=torch.channels_last)


def test_everything_stays_where_it_is_as_CUDA_graphs_need_it() -> None:
    model = decorr_fx.transform(network(), RULE)

    def addresses() -> dict[str, int]:
        tensors = [*model.named_parameters(), *model.named_buffers()]
        return {name: tensor.data_ptr() for name, tensor in tensors}

    before = addresses()
    losses(model, 4)
    assert addresses() == before
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert addresses() == before
