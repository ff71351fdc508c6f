import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from factors import is_identity
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import decorr_fx
from decorr_fx import Power
from decorr_fx.runtime.site.state import sites_of

E, HEADS = 8, 2
DOUBLE = {"dtype": torch.float64}


def assert_all_close(expected: list[Tensor], *found: list[Tensor]) -> None:
    scale = max(float(one.detach().abs().max()) for one in expected)
    for one, *others in zip(expected, *found, strict=True):
        for other in others:
            torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9 * scale)


def take_steps(model: nn.Module, *inputs: Tensor, **arguments: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        out = model(*inputs, **arguments)
        ((out[0] if isinstance(out, tuple) else out) ** 2).mean().backward()
        optimizer.step()


def assert_trains(model: nn.Module, *inputs: Tensor, **arguments: Any) -> None:
    """Take two steps of SGD and check that each of them moves every R."""
    take_steps(model, *inputs, **arguments)
    assert all((counts.steps, counts.refused) == (2, 0) for counts in decorr_fx.stats(model))
    for site in sites_of(model):
        assert not is_identity(site)


def evaluated(model: nn.Module, *inputs: Tensor, **arguments: Any) -> list[Tensor]:
    """Return the outputs in eval mode, with gradients and without: torch has kernels of its own for the latter."""
    found = [model.eval()(*inputs, **arguments)]
    with torch.no_grad():
        found.append(model(*inputs, **arguments))
    return [t for out in found for t in (out if isinstance(out, tuple) else [out])]


@dataclass(frozen=True)
class AttentionCase:
    """An attention, its inputs and how it is called."""

    arguments: dict[str, Any]
    sizes: tuple[int, int, int]  # batch (0: none), queries, keys
    masks: tuple[str, str, int]  # types of padding mask and attention mask, and the latter's dimensions
    call: dict[str, bool]
    alike: tuple[int, int, int]  # which of query, key and value are one tensor: equal numbers

    def make(self) -> nn.MultiheadAttention:
        attention = nn.MultiheadAttention(E, HEADS, **self.arguments, **DOUBLE)
        for parameter in attention.parameters():
            nn.init.normal_(parameter, std=0.5)  # biases start at zero, where nothing could be wrong with them
        return attention

    def inputs(self) -> list[Tensor]:
        batch, queries, keys = self.sizes
        dims = (E, self.arguments["kdim"] or E, self.arguments["vdim"] or E)
        made = []
        for length, dim in zip((queries, keys, keys), dims, strict=True):
            shape = (batch, length, dim) if self.arguments["batch_first"] else (length, batch, dim)
            made.append(torch.randn(shape if batch else (length, dim), requires_grad=True, **DOUBLE))
        return [made[i] for i in self.alike]

    def keywords(self) -> dict[str, Any]:
        batch, queries, keys = self.sizes
        padding_type, type_, dims = self.masks
        causal = self.call["is_causal"]
        shape = (queries, keys) if dims == 2 else (max(batch, 1) * HEADS, queries, keys)
        mask = torch.ones(queries, keys).triu(1).bool() if causal else torch.rand(shape) < 0.4
        padding = torch.rand((batch, keys) if batch else (keys,)) < 0.4
        padding[..., 0] = mask[..., 0] = False  # a row with nothing to look at is NaN, or not, as the kernel likes
        masks = {"key_padding_mask": _as_type(padding, padding_type), "attn_mask": _as_type(mask, type_, causal)}
        return self.call | masks


def _as_type(mask: Tensor, kind: str, causal: bool = False) -> Tensor | None:
    hidden = torch.zeros(mask.shape, **DOUBLE).masked_fill(mask, -math.inf)
    return {"none": None, "bool": mask, "float": hidden if causal else hidden + torch.randn_like(hidden)}[kind]


@st.composite
def attention_cases(draw: st.DrawFn) -> AttentionCase:
    """Draw over all arguments of the layer and of its forward."""
    batch, alike = draw(st.integers(0, 3)), draw(st.sampled_from([(0, 1, 2), (0, 1, 1), (0, 0, 0)]))
    queries, causal = draw(st.integers(1, 4)), draw(st.booleans())
    keys = queries if alike[1] == 0 or causal else draw(st.integers(1, 5))
    kdim = None if alike[1] == 0 else draw(st.sampled_from([None, 5]))
    kind = draw(st.sampled_from(["bool", "float"]))  # of both masks: torch deprecates a mixture
    usual = {"bias": True, "add_bias_kv": False, "add_zero_attn": False, "batch_first": True}  # and torch's fast path
    arguments = {
        "kdim": kdim,
        "vdim": kdim if alike[2] < 2 else draw(st.sampled_from([None, 3])),
        "dropout": draw(st.sampled_from([0.0, 0.4])),
        **(usual if draw(st.booleans()) else {name: draw(st.booleans()) for name in usual}),
    }
    mask = (kind, 2) if causal else (draw(st.sampled_from(["none", kind])), draw(st.sampled_from([2, 3])))
    masks = (draw(st.sampled_from(["none", kind])), *mask)
    call = {name: draw(st.booleans()) for name in ("need_weights", "average_attn_weights")}
    return AttentionCase(arguments, (batch, queries, keys), masks, call | {"is_causal": causal}, alike)


@given(attention_cases(), st.sampled_from(["train", "eval", "no_grad"]))
@settings(max_examples=120)
def test_any_attention_gives_the_outputs_weights_and_gradients_of_the_plain_one(case: AttentionCase, mode: str) -> None:
    torch.manual_seed(0)
    plain, inputs, keywords = case.make().train(mode == "train"), case.inputs(), case.keywords()
    found = []
    for attention in (plain, decorr_fx.transform(copy.deepcopy(plain))):
        torch.manual_seed(1)
        with torch.set_grad_enabled(mode != "no_grad"):  # without gradients torch has a kernel of its own
            out, weights = attention(*inputs, **keywords)
        assert (weights is not None) == case.call["need_weights"]
        outputs = [out] if weights is None else [out, weights]
        found.append(outputs + ([F.dropout(out)] if mode == "train" else []))  # its mask is in the order of memory
        if mode != "no_grad":
            slopes = [torch.linspace(-1, 2, o.numel(), **DOUBLE).reshape(o.shape) for o in outputs]
            loss = sum((o * slope).sum() for o, slope in zip(outputs, slopes, strict=True))
            found[-1] += torch.autograd.grad(loss, [*dict.fromkeys(inputs), *attention.parameters()])
    assert_all_close(*found)


@pytest.mark.parametrize("arguments", [{}, {"kdim": 5, "vdim": 3}, {"bias": False}, {"add_bias_kv": True}], ids=str)
def test_a_trained_attention_folds_into_the_plain_class(arguments: dict[str, Any]) -> None:
    fresh, plain = (nn.MultiheadAttention(E, HEADS, **arguments, **DOUBLE) for _ in range(2))
    reference = copy.deepcopy(plain)
    keys = list(plain.state_dict())
    model = decorr_fx.transform(plain)
    assert set(keys) < model.state_dict().keys()
    assert (len(decorr_fx.report(model).sites), decorr_fx.report(model).skipped) == (4, ())
    inputs = [torch.randn(6, 4, dim, **DOUBLE) for dim in (E, arguments.get("kdim", E), arguments.get("vdim", E))]
    assert_trains(model, *inputs)
    folded = decorr_fx.fold(model)
    assert (type(folded), list(folded.state_dict())) == (nn.MultiheadAttention, keys)
    fresh.load_state_dict(folded.state_dict(), strict=True)
    assert_all_close(*(evaluated(each, *inputs) for each in (model, folded, fresh)))
    take_steps(reference, *inputs)
    assert not torch.allclose(reference.eval()(*inputs)[0], model(*inputs)[0], rtol=1e-6)  # R did something


class SelfAndCross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own, self.cross = nn.MultiheadAttention(E, HEADS), nn.MultiheadAttention(E, HEADS)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.cross(self.own(x, x, x)[0], memory, memory)[0]


Q, K, V = PARTS = [f"in_proj_weight[{i * E}:{(i + 1) * E}]" for i in range(3)]
SHARED = {f"own.{K}": f"own.{Q}", f"own.{V}": f"own.{Q}", f"cross.{V}": f"cross.{K}"}


@pytest.mark.parametrize("share", [True, False])
def test_projections_of_one_value_share_one_R_unless_told_not_to(share: bool) -> None:
    rule, bare = Power(share_inputs=share), nn.MultiheadAttention(E, HEADS)
    for model, names, shared in ((SelfAndCross(), ("own.", "cross."), SHARED), (bare, ("",), {})):
        expected = {name + part: "" for name in names for part in (*PARTS, "out_proj")} | (shared if share else {})
        for report in (decorr_fx.report(model, rule), decorr_fx.report(decorr_fx.transform(model, rule))):
            assert {site.fqn: site.shares_with for site in report.sites} == expected
            assert all((site.bytes == 0) == bool(site.shares_with) for site in report.sites)


def layer(kind: str = "Encoder", **arguments: Any) -> Any:
    cls = getattr(nn, f"Transformer{kind}Layer")
    return cls(E, HEADS, 12, **{"dropout": 0.2, "batch_first": True, **DOUBLE} | arguments)


def encoder(nested: bool = True, **arguments: Any) -> nn.TransformerEncoder:
    return nn.TransformerEncoder(layer(**arguments), 2, nn.LayerNorm(E, **DOUBLE), enable_nested_tensor=nested)


CAUSAL = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
MASKS = {"src_mask": CAUSAL, "src_key_padding_mask": PADDING.double() * -1e9, "is_causal": True}
CROSS = {"tgt_mask": CAUSAL, "tgt_is_causal": True, "memory_key_padding_mask": PADDING}
TRANSFORMERS: dict[str, tuple[nn.Module, int, dict[str, Any]]] = {
    "post": (layer(), 6, {}),
    "post-gelu": (layer(activation="gelu", batch_first=False), 6, {}),
    "pre": (layer(norm_first=True, batch_first=False), 6, {}),
    "pre-gelu": (layer(norm_first=True, activation="gelu"), 6, {}),
    "masks": (layer(), 6, MASKS),
    "encoder": (encoder(), 12, {}),
    "encoder-causal": (encoder(), 12, {"mask": CAUSAL, "is_causal": True}),
    "encoder-mask": (encoder(nested=False, norm_first=True), 12, {"mask": CAUSAL < 0}),
    "encoder-mask-of-heads": (encoder(), 12, {"mask": torch.rand(3 * HEADS, 5, 5) < torch.arange(5) / 9}),
    "decoder": (layer("Decoder", batch_first=False), 10, {}),
    "decoder-masks": (layer("Decoder", norm_first=True, activation="gelu"), 10, CROSS),
    "both": (nn.Transformer(E, HEADS, 1, 1, 12, 0.2, batch_first=True, **DOUBLE), 16, {"tgt_mask": CAUSAL}),
}


def assert_equal_in_train(plain: nn.Module, model: nn.Module, *inputs: Tensor, **keywords: Any) -> None:
    torch.manual_seed(1)
    expected = plain.train()(*inputs, **keywords)
    torch.manual_seed(1)
    assert_all_close([expected], [model.train()(*inputs, **keywords)])


@pytest.mark.parametrize(("plain", "layers", "keywords"), TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_a_torch_transformer_is_the_plain_one_and_folds(
    plain: nn.Module, layers: int, keywords: dict[str, Any]
) -> None:
    encodes = isinstance(plain, nn.TransformerEncoderLayer | nn.TransformerEncoder)
    inputs = [torch.randn(3, 5, E, **DOUBLE) for _ in range(1 if encodes else 2)]
    model = decorr_fx.transform(copy.deepcopy(plain))
    assert (len(decorr_fx.report(model).sites), decorr_fx.report(model).skipped) == (layers, ())
    assert_all_close(*(evaluated(each, *inputs, **keywords) for each in (plain, model)))
    assert_equal_in_train(plain, model, *inputs, **keywords)
    assert_trains(model, *inputs, **keywords)
    folded = decorr_fx.fold(model)
    assert [type(m) for m in folded.modules()] == [type(m) for m in plain.modules()]
    fresh = copy.deepcopy(plain)
    fresh.load_state_dict(folded.state_dict(), strict=True)
    assert_all_close(*(evaluated(each, *inputs, **keywords) for each in (model, folded, fresh)))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("nested", [True, False])
def test_an_encoder_with_padding_is_the_plain_one_where_there_is_none(nested: bool) -> None:
    plain, x, padding = encoder(nested=nested), torch.randn(3, 5, E, **DOUBLE), {"src_key_padding_mask": PADDING}
    model = decorr_fx.transform(copy.deepcopy(plain))
    assert_equal_in_train(plain, model, x, **padding)
    assert_trains(model, x, **padding)
    for pair in ((plain, decorr_fx.transform(plain)), (model, decorr_fx.fold(model))):
        assert_all_close(*([out[~PADDING] for out in evaluated(each, x, **padding)] for each in pair))


class Doubled(nn.TransformerEncoderLayer):
    def forward(self, src: Tensor) -> Tensor:
        return super().forward(2 * src)


def test_a_subclass_that_calls_the_fast_path_of_torch_folds_to_what_it_computes() -> None:
    model, x = decorr_fx.transform(Doubled(E, HEADS, 12, batch_first=True, **DOUBLE)), torch.randn(3, 5, E, **DOUBLE)
    assert_trains(model, x)
    folded = decorr_fx.fold(model)
    assert type(folded) is Doubled
    assert_all_close(evaluated(model, x), evaluated(folded, x))


def test_a_folded_encoder_layer_exports(tmp_path: Path) -> None:
    model, x = decorr_fx.transform(layer(dtype=torch.float32)), torch.randn(3, 5, E)
    assert_trains(model, x)
    report = decorr_fx.export_onnx(model, tmp_path / "m.onnx", x)
    assert report.max_error is not None and report.max_error < 1e-5
    assert report.batch_sizes == (3, 4)


def test_an_encoder_layer_compiles_into_one_graph() -> None:
    model, x, found = decorr_fx.transform(layer()), torch.randn(3, 5, E, **DOUBLE), []
    torch._dynamo.reset()
    for each in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        for site in sites_of(model):
            site.begin_recording()
        torch.manual_seed(1)
        out = each(x)
        found.append([out, *torch.autograd.grad(out.square().sum(), model.parameters())])
        assert all(site.seen == 15 for site in sites_of(model))
    assert_all_close(*found)
