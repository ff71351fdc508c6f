import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import MODELS, small_cnn
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import decorr_fx
from decorr_fx import Crgd, Dbp, Power, Rule
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


RULES = {
    "default": Power(update_every=1),
    "dbp": Dbp(update_every=1),
    "kronecker": Crgd(structure="kronecker", update_every=1),
    "published": Dbp(structure="full", preserve_function=False, decor_lr=0.01, update_every=1),
    "seldom": Power(update_every=4),
}


FIXED, DYNAMIC = [16] * 20, [16, 9, 12] * 7


@pytest.mark.parametrize(
    ("rule", "batch_sizes"),
    [*((rule, FIXED) for rule in RULES.values()), (RULES["default"], DYNAMIC), (RULES["seldom"], DYNAMIC)],
    ids=[*RULES, "default-dynamic", "seldom-dynamic"],
)
def test_a_compiled_model_trains_as_the_eager_one_in_one_graph(rule: Rule, batch_sizes: list[int]) -> None:
    plain = without_dropout().double()  # Adam makes whole steps of float32's rounding where a gradient is zero
    eager = decorr_fx.transform(copy.deepcopy(plain), rule)
    inner = decorr_fx.transform(plain, rule)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(inner, fullgraph=True, backend=counter)
    expected = losses(eager, list(eager.parameters()), batch_sizes)
    got = losses(compiled, list(inner.parameters()), batch_sizes)
    assert got == pytest.approx(expected, rel=1e-8)
    assert counter.frame_count == len(set(batch_sizes[:2]))  # one for the first batch, and one for all others
    for own, other in zip(sites_of(inner), sites_of(eager), strict=True):
        assert int(own.steps) == int(other.steps) > 5
        for mine, its in zip(own.state, other.state, strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("modes", "control_flow", "spectral_norm")])
def test_a_compiled_model_records_what_the_eager_one_does(name: str) -> None:
    case = MODELS[name]
    model, x = decorr_fx.transform(case.make()), torch.randn(case.shape)
    recorded = []
    for running in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        for site in sites_of(model):
            site.begin_recording()
            site.rows.zero_()
        torch.manual_seed(1)
        out = running(x)
        recorded.append(
            [out, *(part.clone() for site in sites_of(model) for part in (site.rows, site.seen, site.host))]
        )
    for eager, compiled in zip(*recorded, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    assert all(site.seen > 0 for site in sites_of(model))


def test_a_compiled_model_records_nothing_where_nothing_moves() -> None:
    model, x = decorr_fx.transform(without_dropout(), Power(update_every=3)), torch.randn(4, 3, 8, 8)
    compiled, recorded = torch.compile(model, fullgraph=True, backend="aot_eager"), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with decorr_fx.paused(model):
        compiled(x)
        assert not any(site.seen for site in sites_of(model))
    compiled.eval()(x)
    assert not any(site.seen for site in sites_of(model))
    compiled.train()
    for _ in range(20):
        optimizer.zero_grad()
        compiled(x).square().mean().backward()
        recorded.append([bool(site.seen) for site in sites_of(model)])
        optimizer.step()
    assert all(of_step in ([True] * 4, [False] * 4) for of_step in recorded)
    assert [int(site.steps) for site in sites_of(model)] == [sum(map(all, recorded))] * 4
    assert 6 < sum(map(all, recorded)) < 15


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


class Attention(nn.Module):
    """Attention as vision transformers have it: one linear for q, k and v."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        out: torch.Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class FunctionalMlp(nn.Module):
    """A user's forward that calls its weight as a function, and a child beside it."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight, self.out = nn.Parameter(torch.randn(2 * d, d) / d), nn.Linear(2 * d, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(F.gelu(F.linear(x, self.weight)))
        return out


class Block(nn.Module):
    def __init__(self, d: int, functional: bool) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn = nn.LayerNorm(d), nn.LayerNorm(d), Attention(d)
        plain_mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        self.mlp = FunctionalMlp(d) if functional else plain_mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Mixed(nn.Module):
    """A block with a call of its own weight and a child that is a linear."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight, self.layer = nn.Parameter(torch.randn(d, d) / d), nn.Linear(d, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.linear(self.layer(x).relu(), self.weight)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "linears": lambda: Block(8, False),
    "functional": lambda: Block(8, True),
    "mixed": lambda: Mixed(8),
    "torch": lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True),
}


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch's own, where it compiles
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "blocks"])
@pytest.mark.parametrize("name", BLOCKS)
def test_as_many_graphs_as_of_the_plain_model(name: str, whole: bool) -> None:
    """Of equal blocks, over steps at which R moves and others: compiled as one model, and block by block."""
    counted = []
    for transform in (False, True):
        torch._dynamo.reset()
        model, x = nn.Sequential(*(BLOCKS[name]() for _ in range(3))), torch.randn(4, 5, 8)
        model = decorr_fx.transform(model, Power(update_every=4)) if transform else model
        counter = CompileCounterWithBackend("eager")
        running = torch.compile(model, fullgraph=True, backend=counter) if whole else model
        for block in () if whole else model:
            block.compile(fullgraph=True, backend=counter)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(20):
            optimizer.zero_grad()
            running(x).square().mean().backward()
            optimizer.step()
        counted.append(counter.frame_count)
    assert counted[1] == counted[0]
    assert len({int(site.steps) for site in sites_of(model)}) == 1
    assert all(site.steps > 6 for site in sites_of(model))
