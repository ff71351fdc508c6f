import copy
import io
import threading

import pytest
import torch
from cases import MODELS, LayerCase, ModelCase, layer_cases, small_cnn
from factors import is_identity
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

import decorr_fx
from decorr_fx import DecorrConfig, LayerError, NotTransformedError
from decorr_fx.passes.rewrite.layer import DecorrelatedLayer
from decorr_fx.runtime.site.state import Site, sites_of

models = pytest.mark.parametrize("case", MODELS.values(), ids=MODELS)


def relative(got: Tensor, expected: Tensor) -> float:
    return float(((got - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).detach())


def train(model: nn.Module, x: Tensor, steps: int = 4, lr: float = 0.05) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) ** 2).mean().backward()
        optimizer.step()


def moved(model: nn.Module) -> list[bool]:
    """Tell of every site whether its R has left the identity."""
    return [not is_identity(site) for site in sites_of(model)]


@models
@pytest.mark.parametrize("training", [True, False])
def test_a_transformed_model_starts_as_the_identity(case: ModelCase, training: bool) -> None:
    plain = case.make().train(training)
    x = torch.randn(case.shape)
    reference = copy.deepcopy(plain)
    model = decorr_fx.transform(plain)
    torch.manual_seed(1)
    expected = reference(x)
    torch.manual_seed(1)
    assert torch.equal(model(x), expected)
    assert [record.fqn for record in decorr_fx.report(model).sites] == list(case.sites)


@models
def test_the_input_model_is_not_changed_and_parameters_are_shared(case: ModelCase) -> None:
    plain = case.make()
    before = {name: (type(module), module.training) for name, module in plain.named_modules()}
    attributes = {name: set(vars(module)) for name, module in plain.named_modules()}
    values = copy.deepcopy(plain.state_dict())
    model = decorr_fx.transform(plain).eval()
    assert {name: (type(module), module.training) for name, module in plain.named_modules()} == before
    assert {name: set(vars(module)) for name, module in plain.named_modules()} == attributes
    for key, value in plain.state_dict().items():
        assert torch.equal(value, values[key])
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in plain.named_parameters(remove_duplicate=False):
        assert own[name] is parameter


@models
def test_a_trained_model_folds_into_the_plain_class(case: ModelCase) -> None:
    plain = case.make()
    x = torch.randn(case.shape)
    model = decorr_fx.transform(copy.deepcopy(plain))
    train(model, x)
    assert all(moved(model))
    expected = model.eval()(x)
    folded = decorr_fx.fold(model)
    assert type(folded) is type(plain)
    assert relative(folded(x), expected) < 1e-5
    assert list(folded.state_dict()) == list(plain.state_dict())
    assert not any(isinstance(m, Site | DecorrelatedLayer) for m in folded.modules())
    fresh = case.make().eval()
    fresh.load_state_dict(folded.state_dict(), strict=True)
    assert relative(fresh(x), expected) < 1e-5
    assert relative(model(x), expected) == 0  # the transformed model can go on


@models
def test_a_trained_model_is_folded_where_it_is(case: ModelCase) -> None:
    plain, x = case.make(), torch.randn(case.shape)
    model = decorr_fx.transform(plain)
    train(model, x)
    expected = decorr_fx.fold(model.eval())
    assert decorr_fx.fold_(model) is model
    assert type(model) is type(plain) and torch.equal(model(x), expected(x))
    for (name, own), other in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(own, other), name
    assert not any(isinstance(m, Site | DecorrelatedLayer) for m in model.modules())
    train(plain, x)  # which has shared its weights all along
    assert torch.equal(model(x), plain.eval()(x))


def test_folding_where_it_is_changes_nothing_where_it_cannot_be() -> None:
    model = decorr_fx.transform(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    train(model, torch.randn(9, 4))
    prune.random_unstructured(model[1], "weight", 0.5)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(LayerError, match="layer '1': its weight was pruned or parametrized after transform"):
        decorr_fx.fold_(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(NotTransformedError, match="Linear has no decorrelated layer"):
        decorr_fx.fold_(nn.Linear(2, 2))


@given(
    layer_cases(),
    st.sampled_from(["full", "kronecker", "block"]),
    st.sampled_from(["power", "dbp", "dbp-normalized", "crgd"]),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=150)
def test_any_layer_trains_and_folds(
    case: LayerCase, structure: str, rule: str, center: bool, preserve_function: bool
) -> None:
    layer, x = case.make(torch.float32)
    config = DecorrConfig(
        structure="auto" if rule == "power" else structure, rule=rule, rank=4, center=center,
        preserve_function=preserve_function, max_dim=6, decor_lr=0.1, update_every=1,
    )  # fmt: skip
    model = decorr_fx.transform(layer, config)
    expected = copy.deepcopy(layer)(x)
    assert torch.equal(model(x), expected)
    train(model, x)
    assert [s.steps + s.refused for s in decorr_fx.stats(model)] == [4]
    folded = decorr_fx.fold(model)
    expected = model.eval()(x)
    scale = expected.abs().max() + sum(p.abs().max() for p in folded.parameters())
    assert float(((folded(x) - expected).abs().max() / scale).detach()) < 1e-5
    layer.load_state_dict(folded.state_dict(), strict=True)


@given(layer_cases(), st.sampled_from(["auto", "full", "kronecker", "block"]), st.booleans())
@settings(max_examples=80)
def test_a_function_preserving_step_leaves_the_outputs(case: LayerCase, structure: str, center: bool) -> None:
    layer, x = case.make(torch.float32)
    rule = "power" if structure == "auto" else "dbp"
    config = DecorrConfig(rule=rule, rank=4, structure=structure, center=center, max_dim=6, decor_lr=0.1)
    model = decorr_fx.transform(layer, config)
    before = model(x).detach()
    decorr_fx.step(model)
    after = model(x).detach()
    scale = before.abs().max() + max(p.detach().abs().max() for p in layer.parameters()) * x.abs().max()
    assert float((after - before).abs().max() / scale) < 1e-5


def test_without_function_preservation_a_step_of_R_alone_changes_the_outputs() -> None:
    model = decorr_fx.transform(nn.Linear(6, 4), DecorrConfig(preserve_function=False, decor_lr=0.1))
    x = 3 * torch.randn(20, 6)
    before, weight = model(x), model.weight.detach().clone()
    decorr_fx.step(model)
    assert relative(model(x), before) > 1e-3
    assert torch.equal(model.weight, weight)


def test_checkpoints_of_the_plain_model_load_and_reset_R() -> None:
    plain = small_cnn()
    checkpoint = copy.deepcopy(plain.state_dict())
    model = decorr_fx.transform(small_cnn())
    x = torch.randn(5, 3, 8, 8)
    train(model, x)
    assert all(moved(model))
    model.load_state_dict(checkpoint, strict=True)
    assert not any(moved(model))
    assert torch.equal(model.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("config", [DecorrConfig(), DecorrConfig(rule="crgd", center=True, update_every=3)])
def test_a_transformed_checkpoint_resumes_bit_for_bit(config: DecorrConfig) -> None:
    def losses(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = (model(torch.randn(5, 3, 8, 8)) ** 2).mean()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    model = decorr_fx.transform(small_cnn(), config)
    optimizer = torch.optim.Adam(model.parameters())
    losses(model, optimizer, 4)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}, file)
    uninterrupted = losses(model, optimizer, 7)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = decorr_fx.transform(small_cnn(), config)
    resumed.load_state_dict(saved["model"], strict=True)
    optimizer = torch.optim.Adam(resumed.parameters())
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"])
    assert losses(resumed, optimizer, 7) == uninterrupted


def test_dropout_masks_are_those_of_the_plain_model() -> None:
    def masks(model: nn.Module) -> list[Tensor]:
        found: list[Tensor] = []
        model[6].register_forward_hook(lambda module, inputs, output: found.append(output == 0))
        torch.manual_seed(3)
        with torch.no_grad():
            for _ in range(3):
                model(torch.ones(5, 3, 8, 8))
        return found

    plain = small_cnn()
    assert all(map(torch.equal, masks(copy.deepcopy(plain)), masks(decorr_fx.transform(plain))))


def test_submodules_called_by_hand_and_hooks_on_them_go_on_working() -> None:
    model = decorr_fx.transform(nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.Linear(6, 2)))
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(9, 6)
    train(model, x, steps=2)
    assert len(calls) == 2
    folded = decorr_fx.fold(model)
    assert relative(folded[0](x), model[0](x)) < 1e-6


def test_copies_and_pickles_are_independent_models() -> None:
    model = decorr_fx.transform(small_cnn(), DecorrConfig(center=True))
    x = torch.randn(5, 3, 8, 8)
    train(model, x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        expected = model.eval()(x)
        assert torch.equal(other.eval()(x), expected)
        train(other.train(), x)  # moves the R and the W of the copy only
        assert torch.equal(model.eval()(x), expected)
        folded = decorr_fx.fold(other)
        assert relative(folded.eval()(x), other.eval()(x)) < 1e-5
        other.load_state_dict(model.state_dict())


def test_statistics_and_R_stay_in_float32_when_the_model_is_cast() -> None:
    model = decorr_fx.transform(nn.Linear(6, 4))
    train(model, torch.randn(8, 6))
    V = model.weight_decorr.V.clone()
    model.to(torch.bfloat16)
    assert model.weight.dtype is torch.bfloat16
    assert torch.equal(model.weight_decorr.V, V)
    train(model, torch.randn(8, 6, dtype=torch.bfloat16))
    assert model.weight_decorr.rows.dtype is torch.float32
    assert decorr_fx.fold(model).weight.dtype is torch.bfloat16
    assert model.double().weight_decorr.V.dtype is torch.float64


def test_the_graph_has_a_record_and_a_decorrelate_node_before_the_call_and_eval_records_nothing() -> None:
    layer = decorr_fx.transform(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"))
    assert isinstance(layer, DecorrelatedLayer)
    names = {mode: [n.name for n in getattr(layer.run, mode).nodes] for mode in ("train", "evaluate")}
    assert names["train"][-7:] == [
        "record", "weight_decorr_1", "decorrelate_call", "getitem", "getitem_1", "conv2d", "output"
    ]  # fmt: skip
    assert "pad" in names["train"]
    assert "record" not in names["evaluate"]
    assert "decorrelate_call" in names["evaluate"]


def test_centering_needs_a_bias_and_the_report_says_so() -> None:
    model = decorr_fx.transform(nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2)), DecorrConfig(center=True))
    notes = [site.note for site in decorr_fx.report(model).sites]
    assert notes == ["not centred: no bias of its own", ""]
    x = 5 + torch.randn(30, 4)
    train(model, x, lr=0.001)
    assert relative(decorr_fx.fold(model)(x), model.eval()(x)) < 1e-5


def test_a_child_that_was_transformed_on_its_own_folds_with_its_parent() -> None:
    model = nn.Sequential(decorr_fx.transform(nn.Sequential(nn.Linear(6, 6))), nn.Linear(6, 2))
    x = torch.randn(9, 6)
    train(model, x)
    folded = decorr_fx.fold(model)
    assert relative(folded(x), model.eval()(x)) < 1e-5
    assert vars(folded[0]).keys() == vars(nn.Sequential()).keys()
    assert not folded[0]._load_state_dict_pre_hooks


def test_what_cannot_be_copied_is_an_error_that_says_so() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.lock = threading.Lock()
    with pytest.raises(decorr_fx.ModelError, match=r"Sequential cannot be copied: cannot pickle '_thread.lock'"):
        decorr_fx.transform(model)


def test_what_a_forward_leaves_in_lists_is_no_hindrance() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.kept = nn.Linear(6, 6), [torch.ones(1)]

        def train(self, mode: bool = True) -> None:  # as some do: it returns nothing
            super().train(mode)

        def forward(self, x: Tensor) -> Tensor:
            self.kept = [self.layer(x) * self.kept[0].mean().detach(), {"it": x}]
            return self.kept[0]

    plain, x = Keeps(), torch.randn(4, 6)
    plain(x)
    before = plain.kept[0].clone()
    model = decorr_fx.transform(plain)
    train(model, x)
    torch.testing.assert_close(decorr_fx.fold(model).layer(x), model.layer(x))
    assert torch.equal(plain.kept[0], before)


def test_a_bias_that_something_else_holds_is_not_shifted() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))
    model[1].bias = model[0].bias
    assert decorr_fx.report(model, DecorrConfig(center=True)).sites[0].note.startswith("not centred")


def test_the_mean_of_a_padded_convolution_counts_its_zeros() -> None:
    """Folding is exact at the border too: the mean is that of the patches, not of the pixels."""
    model = decorr_fx.transform(nn.Conv2d(2, 3, 3, padding=1), DecorrConfig(center=True, decor_lr=0.1))
    x = 2 + torch.randn(4, 2, 5, 5)
    train(model, x, lr=0.001)
    assert model.weight_decorr.mean.abs().max() > 0.1
    assert relative(decorr_fx.fold(model)(x), model.eval()(x)) < 1e-5
