import copy

import pytest
import torch
from cases import MODELS, small_cnn
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import decorr_fx
from decorr_fx import DecorrConfig
from decorr_fx.runtime.site.state import sites_of


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def without_dropout() -> nn.Module:
    model = small_cnn()
    model[6] = nn.Identity()
    return model


def losses(model: nn.Module, parameters: list[nn.Parameter], batch_sizes: list[int]) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    found = []
    for size in batch_sizes:
        x = torch.randn(size, 3, 8, 8, generator=generator, dtype=next(model.parameters()).dtype)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), torch.arange(size) % 10)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize(
    "config",
    [
        DecorrConfig(update_every=1),
        DecorrConfig(rule="dbp", update_every=1),
        DecorrConfig(structure="kronecker", center=True, rule="crgd", preserve_function=False, update_every=1),
    ],
    ids=["default", "dbp", "kronecker-centered"],
)
@pytest.mark.parametrize("batch_sizes", [[16] * 20, [16, 9, 12] * 7], ids=["fixed", "dynamic"])
def test_a_compiled_model_trains_as_the_eager_one_in_one_graph(config: DecorrConfig, batch_sizes: list[int]) -> None:
    plain = without_dropout().double()  # Adam makes whole steps of float32's rounding where a gradient is zero
    eager = decorr_fx.transform(copy.deepcopy(plain), config)
    inner = decorr_fx.transform(plain, config)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(inner, fullgraph=True, backend=counter)
    expected = losses(eager, list(eager.parameters()), batch_sizes)
    got = losses(compiled, list(inner.parameters()), batch_sizes)
    assert got == pytest.approx(expected, rel=1e-8)
    # one for the first batch, one where the batch is dynamic, and one where R goes to the other side at some batch
    assert counter.frame_count == (1 if len(set(batch_sizes)) == 1 else 2 if config.center else 3)
    for own, other in zip(sites_of(inner), sites_of(eager), strict=True):
        assert own.steps == len(batch_sizes)
        for factor, expected_factor in zip(own.factors, other.factors, strict=True):
            torch.testing.assert_close(factor, expected_factor, rtol=1e-6, atol=1e-8)


def test_a_factor_over_taps_of_a_large_weight_is_no_break() -> None:
    plain = nn.Sequential(
        nn.Conv2d(64, 128, 3), nn.ReLU(), nn.Conv2d(128, 64, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    model = decorr_fx.transform(plain, DecorrConfig(rule="dbp", structure="kronecker"))
    x = torch.randn(3, 64, 7, 7)
    model(x).square().sum().backward()
    decorr_fx.step(model)
    gradients = []
    for running in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        running(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_a_compiled_model_folds_and_tells_its_stats() -> None:
    model = torch.compile(decorr_fx.transform(without_dropout()), fullgraph=True)
    losses(model, list(model.parameters()), [16] * 3)
    folded = decorr_fx.fold(model)
    assert type(folded) is nn.Sequential
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(folded.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    assert all(s.steps == 3 for s in decorr_fx.stats(model))
    assert len(decorr_fx.report(model).sites) == 4


def test_checkpointing_inside_a_compiled_model_records_once() -> None:
    inner = decorr_fx.transform(nn.Linear(6, 6))

    @torch.compile(fullgraph=True)
    def forward(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(inner, x, use_reentrant=False).relu()

    forward(torch.randn(7, 6, requires_grad=True)).sum().backward()
    (site,) = sites_of(inner)
    assert site.seen == 7


@pytest.mark.parametrize(
    "name",
    ["weight_norm", "functional", "subclass", "shared", "up_sample", "same_padded", "reads_its_child", "attention"],
)
def test_other_layers_compile_into_one_graph(name: str) -> None:
    case = MODELS[name]
    model = decorr_fx.transform(case.make())
    x = torch.randn(case.shape)
    expected = model(x)
    for site in sites_of(model):
        site.forget()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    assert all(site.seen > 0 for site in sites_of(model))
