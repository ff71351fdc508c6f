"""Pruning real models: units that are told by others vanish, and the rest is as good as least squares makes it."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import decorr_fx
from decorr_fx import ConfigError, LayerError, ModelError, Units
from decorr_fx.inputs import Example
from decorr_fx.ops import reference
from decorr_fx.ops.prune.cut import total
from decorr_fx.passes.prune.groups import UnitGroups
from decorr_fx.passes.prune.moments import estimate_statistics
from decorr_fx.passes.prune.propagate import find_units


def images(count: int, size: int = 32, channels: int = 3) -> list[Tensor]:
    return list(torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(0)).split(64))


def tokens(count: int = 40) -> list[Tensor]:
    return list(torch.randint(50, (count, 7), generator=torch.Generator().manual_seed(0)).split(8))


TRANSFORMER: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


class Excited(nn.Module):
    """Channels weighed by what a small net makes of their means, behind a PReLU, a pad and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.slopes = nn.ConvTranspose2d(3, 8, 2), nn.PReLU(8)
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.gamma = nn.Parameter(1 + torch.rand(8, 1, 1))
        self.register_buffer("scale", 1 + torch.rand(8, 1, 1), persistent=False)
        self.last = nn.ConvTranspose2d(8, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(self.slopes(self.first(x)), (1, 1, 1, 1)) * self.gamma / self.scale
        x = x * self.up(self.down(x.mean((2, 3), keepdim=True)).tanh()).sigmoid()
        return self.head(self.last(x).relu().permute(0, 2, 3, 1).mean((1, 2)))


def vgg() -> nn.Module:
    """Return convolutions and linears on what is flattened, as VGG has them."""
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(12 * 36, 20), nn.Tanh(), nn.Linear(20, 5))


@dataclass(frozen=True)
class Case:
    """A model, what it is called with, and which of its layers are pruned."""

    make: Callable[[], nn.Module]
    batches: Callable[[], list[Tensor]]
    groups: int
    residual_streams: bool = False
    filter_fn: Callable[[nn.Module, str], bool] | None = None


CASES = {
    "vgg": Case(vgg, lambda: images(64), 3),
    "torchvision vgg": Case(
        lambda: torchvision.models.VGG(torchvision.models.vgg.make_layers([8, "M", 16, 512, "M"], batch_norm=True)),
        lambda: images(16), 3, filter_fn=lambda _, fqn: fqn.startswith("features"),
    ),
    "resnet18": Case(torchvision.models.resnet18, lambda: images(192, 64), 8),
    "resnet18, streams": Case(torchvision.models.resnet18, lambda: images(640), 12, residual_streams=True),
    "resnet50": Case(
        lambda: torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], width_per_group=16),
        lambda: images(64, 64), 9,
    ),
    "mobilenet_v2": Case(lambda: torchvision.models.mobilenet_v2(width_mult=0.1), lambda: images(1300), 18),
    "densenet": Case(
        lambda: torchvision.models.DenseNet(4, (2, 2), 8), lambda: images(64), 10
    ),
    "excited": Case(Excited, lambda: images(32, 8), 3),
    "vit": Case(
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=5),
        lambda: images(64), 2,
    ),
    "bert": Case(lambda: BertModel(BertConfig(intermediate_size=24, **TRANSFORMER)), tokens, 1),
    "gpt2": Case(
        lambda: GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50, eos_token_id=0,
                                           bos_token_id=0)),
        tokens, 1,
    ),
    "llama": Case(lambda: LlamaForCausalLM(LlamaConfig(intermediate_size=24, **TRANSFORMER)), tokens, 1),
}  # fmt: skip


def leave(case: Case, model: nn.Module) -> Callable[[Any], str]:
    """Return what a group is left alone for in this case."""

    def refuse(group: Any) -> str:
        kept = case.filter_fn is None or all(case.filter_fn(model.get_submodule(m), m) for m in group.makers)
        return "" if kept and (case.residual_streams or not group.added) else "left"

    return refuse


def make_twins(model: nn.Module, found: UnitGroups) -> None:
    """Let every odd unit be what the even one before it is."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for one in found.slices:
        if one.role == "reads":
            continue
        tensor, start = state[one.tensor].detach().movedim(one.dim, 0), 0
        for segment in one.axis:
            if segment.group is not None:
                own = tensor[start : start + segment.units * segment.inner].unflatten(0, (segment.units, segment.inner))
                pairs = segment.units // 2
                own[1 : 2 * pairs : 2] = own[0 : 2 * pairs : 2].clone()
            start += segment.units * segment.inner


def even_first(units: Units) -> Tensor:
    return 1.0 - torch.arange(len(units.norms)) % 2


def first_output(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


@pytest.mark.parametrize("name", CASES)
def test_twins_vanish_and_outputs_stay(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model, batches = case.make().eval().double(), case.batches()  # rounding adds up over fifty layers
    batches = [batch.double() if batch.is_floating_point() else batch for batch in batches]
    found = find_units(model, Example.of(batches[0][:2]), leave(case, model))
    assert len(found.groups) == case.groups
    make_twins(model, found)
    estimate_statistics(model, batches)
    halves, priced = (
        [-(-g.units // 2) for g in found.groups],
        found.priced({key: tuple(value.shape) for key, value in model.state_dict().items()}, found.works),
    )
    keep = total(priced, halves) / total(priced, [g.units for g in found.groups]) + 1e-9
    result = decorr_fx.prune(
        model, batches, keep=keep, order=even_first, example_inputs=batches[0][:2],
        residual_streams=case.residual_streams, filter_fn=case.filter_fn,
    )  # fmt: skip
    assert [g.kept for g in result.report.groups] == halves
    x = batches[0][:8]
    with torch.no_grad():
        expected, got = first_output(model(x)), first_output(result.model(x))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert result.report.after.macs == counted_macs(result.model, batches[0][:1])
    assert result.report.before.macs == counted_macs(model, batches[0][:1])
    assert "folded into" in str(result.report)


def counted_macs(model: nn.Module, x: Tensor) -> int:
    """Return the multiply-adds of convolutions and products with weights, by torch's counter."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    of_layers = ("convolution", "addmm", ".mm")
    return sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op).endswith(of_layers)) // 2


def mlp(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 4)).to(dtype)


def rows(count: int = 200, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(2), dtype=dtype)


def first_units(units: decorr_fx.Units) -> Tensor:
    """An order of one's own: the first units are kept."""
    return -torch.arange(len(units.norms), dtype=torch.float64)


@pytest.mark.parametrize("order", ["backward", "zca", "l1", first_units])
@pytest.mark.parametrize("weighting", ["output", "variance"])
def test_the_reader_is_least_squares_and_the_report_tells_its_error(order: Any, weighting: Any) -> None:
    model, x = mlp(), rows()
    result = decorr_fx.prune(model, x.split(50), keep=0.4, order=order, weighting=weighting, example_inputs=x[:1])
    (group,) = result.report.groups
    assert result.report.after.macs == 10 * group.kept == 80
    hidden = model[1](model[0](x)).detach()
    kept = [int((model[0].weight == row).all(1).nonzero()) for row in result.model[0].weight]
    assert order is not first_units or kept == list(range(8))
    W = model[2].weight.detach()
    torch.testing.assert_close(result.model[2].weight, nn.Parameter(reference.fold_removed(W, hidden, kept)),
                               rtol=1e-8, atol=1e-8)  # fmt: skip
    error = (result.model(x) - model(x)).square().sum(1).mean() / (hidden @ W.T).square().sum(1).mean()
    assert group.error == pytest.approx(error.item(), rel=1e-8)


def test_keeping_everything_is_the_identity_and_nothing_of_the_model_changes() -> None:
    model, batches = CASES["vgg"].make().train(), images(64)
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    whole = decorr_fx.prune(model, batches, keep=1.0, example_inputs=batches[0][:1])
    assert all(torch.equal(value, before[key]) for key, value in whole.model.state_dict().items())
    half = decorr_fx.prune(model, batches, example_inputs=batches[0][:1])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in [*model.modules(), *half.model.modules()])
    assert not half.model[0].weight.requires_grad and half.model[3].weight.requires_grad
    assert half.model[4].momentum == 0.1 and half.model[4].num_features == half.model[3].out_channels
    assert 0.45 < half.report.after.macs / half.report.before.macs <= 0.5


def test_parameters_multiples_and_least_counts() -> None:
    model, batches = CASES["vgg"].make(), images(64)
    result = decorr_fx.prune(
        model, batches, keep=0.6, measure="params", round_to=4, min_units=8, example_inputs=batches[0][:1]
    )
    assert all(g.kept % 4 == 0 and g.kept >= 8 for g in result.report.groups)
    assert sum(p.numel() for p in result.model.parameters()) == result.report.after.params
    assert 0.5 < result.report.after.params / result.report.before.params <= 0.6


def train_step(model: nn.Module, x: Tensor) -> None:
    model(x).square().mean().backward()
    torch.optim.Adam(model.parameters()).step()


def test_it_composes_with_every_other_verb(tmp_path: Path) -> None:
    x = images(64, 16, 1)[0]
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU(),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))  # fmt: skip
    model = decorr_fx.transform(plain)
    train_step(model, x)
    with pytest.raises(ModelError, match=r"Sequential is transformed; fold it first: prune\(decorr_fx.fold\(model\)"):
        decorr_fx.prune(model, [x], example_inputs=x)
    small = decorr_fx.prune(decorr_fx.fold(model), [x], example_inputs=x).model
    again = decorr_fx.transform(small)
    train_step(again, x)
    assert decorr_fx.stats(again)[0].steps == 1
    sizes = []
    for name, one in (("whole", plain), ("small", again)):
        report = decorr_fx.export_onnx(one, tmp_path / f"{name}.onnx", x[:1])
        session = onnxruntime.InferenceSession(str(report.path))
        assert session.run(None, {session.get_inputs()[0].name: x[:3].numpy()})[0].shape == (3, 3)
        sizes.append(sum(file.stat().st_size for file in tmp_path.glob(f"{name}.onnx*")))
    assert sizes[1] < sizes[0]


def test_batches_of_keyword_arguments() -> None:
    torch.manual_seed(0)
    config = BertConfig(intermediate_size=24, **TRANSFORMER)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in tokens()]
    example = {name: tensor[:1] for name, tensor in batches[0].items()}
    result = decorr_fx.prune(BertForSequenceClassification(config), batches, keep=0.8, example_inputs=example)
    assert [g.fqn for g in result.report.groups] == ["bert.encoder.layer.0.intermediate.dense", "bert.pooler.dense"]
    assert result.model(**batches[0]).logits.shape == (8, 2)


class Everything(nn.Module):
    """Layers whose units cannot be removed, each for a reason of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(3, 4, 1)
        self.groups = nn.Conv2d(4, 4, 1, groups=2)
        self.twice = nn.Conv2d(4, 4, 1)
        self.computed = parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
        self.normed, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.groups(self.grouped(x))))
        return self.head(self.norm(self.normed(self.computed(x).mean((2, 3)))))


REASONS = {
    "grouped": "a grouped convolution reads its units, and cannot make up for removed ones",
    "twice": "'twice.weight' is shared by several calls",
    "normed": "layer_norm mixes its units, or moves them",
    "head": "its units are an output of the model",
}


def test_what_cannot_be_removed_is_listed_with_the_reason() -> None:
    model = Everything()
    found = find_units(model, Example.of(torch.randn(2, 3, 4, 4)), lambda group: "")
    assert found.groups == ()
    assert found.left == REASONS
    with pytest.raises(ModelError, match=r"Everything has no units that can be removed\. grouped: a grouped"):
        decorr_fx.prune(model, images(8, 4), example_inputs=torch.randn(2, 3, 4, 4))


def test_tied_weights_filters_and_streams_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    model[2].weight = model[0].weight
    result = find_units(model, Example.of(rows(3, torch.float32)), lambda group: "")
    assert result.groups == () and "'2.weight' is shared by several calls" in result.left.values()
    case = CASES["resnet18"]
    report = decorr_fx.prune(
        case.make(), case.batches(), example_inputs=images(2)[0], filter_fn=lambda _, fqn: "layer1" not in fqn
    ).report
    reasons = {one.fqn: one.reason for one in report.skipped}
    assert reasons["layer1.0.conv1"] == "filter_fn" and "residual_streams=True" in reasons["layer2.0.downsample.0"]
    assert "layer1.0.conv1" not in {g.fqn for g in report.groups}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"keep": 0}, "keep is 0; use the part of the model that is to stay, above 0, up to 1"),
        ({"keep": 1.5}, "keep is 1.5"),
        ({"keep": "half"}, "keep is 'half'"),
        ({"keep": 0.01}, "keep=0.01 cannot be met: the smallest that can is 0.0500, where"),
        ({"measure": "flops"}, "measure is 'flops'; use one of macs, params"),
        ({"weighting": "both"}, "weighting is 'both'; use one of output, variance"),
        ({"order": "best"}, "order is 'best'; use one of backward, zca"),
        ({"order": lambda units: torch.zeros(3)}, "for layer '0'; it must give 20 finite numbers"),
        ({"round_to": 0}, "round_to is 0; use a whole number of at least 1"),
        ({"min_units": 2.0}, "min_units is 2.0"),
    ],
)
def test_wrong_settings_are_told(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told.replace("(", r"\(")):
        decorr_fx.prune(mlp(), [rows()], example_inputs=rows(1), **changes)


def test_calibration_that_does_not_do_is_told() -> None:
    def prune(batches: Any, model: nn.Module | None = None) -> None:
        decorr_fx.prune(model or mlp(), batches, example_inputs=rows(1))

    nan = rows()
    nan[3] = torch.nan
    with pytest.raises(LayerError, match="layer '2': its input is not finite for batch 1; leave such batches out"):
        prune([rows(), nan])
    with pytest.raises(
        LayerError, match="layer '2': the calibration batches give it 12 rows for 20 units; at least 20"
    ):
        prune([rows(12)])
    with pytest.raises(ModelError, match="there is no batch to calibrate on"):
        prune([])
    with pytest.raises(ModelError, match="calibration is one Tensor; give several batches, or a list of one"):
        prune(rows())
    with pytest.raises(ModelError, match=r"does not run on batch 0: .* without labels"):
        prune([(rows(), torch.zeros(200))])
    model = nn.Sequential(nn.Linear(6, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 4)).double()
    with pytest.raises(ModelError, match="used up: the batches are run twice where there is BatchNorm"):
        prune((batch for batch in [rows()]), model)
    with pytest.raises(ModelError, match="does not run on example_inputs"):
        decorr_fx.prune(mlp(), [rows()], example_inputs=torch.randn(2, 5))
    with pytest.raises(ModelError, match=r"expected a torch.nn.Module, got str"):
        decorr_fx.prune("model", [rows()], example_inputs=rows(1))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 20), nn.Linear(20, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) if x.sum() > 0 else self.b(self.a(-x))


def test_a_model_that_is_no_single_graph_is_told() -> None:
    with pytest.raises(ModelError, match="Branching cannot be exported as one graph, in which units are followed"):
        decorr_fx.prune(Branching(), [rows(dtype=torch.float32)], example_inputs=rows(1, torch.float32))
