import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from factors import is_identity
from peft import LoraConfig, get_peft_model
from torch import Tensor, fx, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel
from transformers.pytorch_utils import Conv1D

import decorr_fx
from decorr_fx import ConfigError
from decorr_fx.passes.capture import adapters
from decorr_fx.runtime.site.state import sites_of

D_IN, D_OUT = 6, 4


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test register what it likes: the registry is the process's own."""
    monkeypatch.setattr(adapters, "_ADAPTERS", dict(adapters._ADAPTERS))


class Weighted(nn.Module):
    """Weights with the outputs first, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D_OUT, D_IN) / 2)
        self.bias = nn.Parameter(torch.randn(D_OUT))


class Einsum(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", x, self.weight) + self.bias


def einsum_adapter(self: Einsum, x: Tensor) -> Tensor:
    return F.linear(x, self.weight, self.bias)


def other_adapter(self: Einsum, x: Tensor) -> Tensor:
    return x @ self.weight.t() + self.bias


class Same(Einsum):
    """A subclass that keeps the forward."""


class Overridden(Einsum):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * torch.einsum("...i,oi->...o", x, self.weight)


class InputsFirst(nn.Module):
    """Weights with the inputs first, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D_IN, D_OUT) / 2)
        self.bias = nn.Parameter(torch.randn(D_OUT))


class Product(InputsFirst):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Addmm(InputsFirst):
    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Transposed(InputsFirst):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.t(), self.bias)


def beside_a_linear(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(D_OUT, 2))


def relative(got: Tensor, expected: Tensor) -> float:
    return float(((got - expected).abs().max() / expected.abs().max()).detach())


def train(model: nn.Module, run: Callable[[], Tensor]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (run() ** 2).mean().backward()
        optimizer.step()


def assert_trains_and_folds(plain: nn.Module, sites: list[str]) -> nn.Module:
    """Check a model from its first output to the fold, which is returned."""
    x, reference = torch.randn(9, D_IN), copy.deepcopy(plain)
    model = decorr_fx.transform(plain)
    assert relative(model(x), reference(x)) < 1e-6
    assert [site.fqn for site in decorr_fx.report(model).sites] == sites
    assert not decorr_fx.report(model).skipped
    for one in (model, reference):
        train(one, lambda one=one: one(x))
    assert [(s.steps, s.refused) for s in decorr_fx.stats(model)] == len(sites) * [(3, 0)]
    assert not any(is_identity(site) for site in sites_of(model))
    folded = decorr_fx.fold(model)
    assert [type(m) for m in folded.modules()] == [type(m) for m in reference.modules()]
    assert [type(m).forward for m in folded.modules()] == [type(m).forward for m in reference.modules()]
    assert torch.equal(folded.eval()(x), model.eval()(x))
    assert relative(reference.eval()(x), model(x)) > 1e-4  # R did something
    reference.load_state_dict(folded.state_dict(), strict=True)
    assert torch.equal(reference(x), folded(x))
    return folded


@pytest.mark.parametrize("name", ["Product", "Addmm", "Transposed", "Conv1D"])
def test_a_weight_that_is_stored_inputs_first_needs_no_adapter(name: str) -> None:
    layer = Conv1D(D_OUT, D_IN) if name == "Conv1D" else globals()[name]()
    assert_trains_and_folds(copy.deepcopy(layer), [""])
    assert_trains_and_folds(beside_a_linear(layer), ["0", "2"])


class TestLinearInOtherClothes:
    def test_without_an_adapter_it_is_skipped_and_the_reason_names_register_layer(self) -> None:
        (skipped,) = decorr_fx.report(decorr_fx.transform(beside_a_linear(Einsum()))).skipped
        assert skipped.fqn == "0"
        assert "decorr_fx.register_layer" in skipped.reason
        with pytest.raises(
            decorr_fx.ModelError, match=r"Einsum has no conv or linear layer.*decorr_fx\.register_layer"
        ):
            decorr_fx.transform(Einsum())

    def test_with_one_it_is_a_site_and_the_fold_has_its_own_forward(self) -> None:
        decorr_fx.register_layer(Einsum, einsum_adapter)
        assert_trains_and_folds(Einsum(), [""])
        folded = assert_trains_and_folds(beside_a_linear(Einsum()), ["0", "2"])
        assert type(folded[0]).forward is Einsum.forward

    def test_what_is_linear_in_the_inputs_first_may_be_a_product_in_the_adapter(self) -> None:
        decorr_fx.register_layer(Einsum, other_adapter)
        assert_trains_and_folds(Einsum(), [""])

    def test_a_subclass_that_keeps_the_forward_uses_the_adapter_and_another_does_not(self) -> None:
        decorr_fx.register_layer(Einsum, einsum_adapter)
        assert_trains_and_folds(beside_a_linear(Same()), ["0", "2"])
        report = decorr_fx.report(beside_a_linear(Overridden()))
        assert [site.fqn for site in report.sites] == ["2"]
        assert [skipped.fqn for skipped in report.skipped] == ["0"]
        decorr_fx.register_layer(Overridden, lambda self, x: 2 * F.linear(x, self.weight))
        assert_trains_and_folds(beside_a_linear(Overridden()), ["0", "2"])

    def test_it_is_left_alone_where_nothing_of_it_is_to_be_decorrelated(self) -> None:
        decorr_fx.register_layer(Einsum, einsum_adapter)
        model = decorr_fx.transform(beside_a_linear(Einsum()), overrides={"0": None})
        assert type(model[0]) is Einsum
        assert [site.fqn for site in decorr_fx.report(model).sites] == ["2"]


class TestRegistration:
    def test_the_same_adapter_again_is_fine_and_another_one_is_an_error_that_names_both(self) -> None:
        decorr_fx.register_layer(Einsum, einsum_adapter)
        decorr_fx.register_layer(Einsum, einsum_adapter)
        with pytest.raises(ConfigError, match=r"^Einsum already has the adapter einsum_adapter, and other_adapter is"):
            decorr_fx.register_layer(Einsum, other_adapter)
        assert adapters.adapter_of(Einsum()) is einsum_adapter
        with pytest.raises(ConfigError, match="MultiheadAttention already has the adapter attention_forward"):
            decorr_fx.register_layer(nn.MultiheadAttention, other_adapter)

    @pytest.mark.parametrize("layer_type", [Einsum.__name__, int, None, F.linear])
    def test_what_is_no_module_class_is_an_error(self, layer_type: Any) -> None:
        with pytest.raises(ConfigError, match=r"^layer_type is .*; use a subclass of torch.nn.Module"):
            decorr_fx.register_layer(layer_type, einsum_adapter)

    def test_an_instance_is_no_type_and_what_cannot_be_called_no_adapter(self) -> None:
        with pytest.raises(ConfigError, match="layer_type is Einsum"):
            decorr_fx.register_layer(Einsum(), einsum_adapter)
        with pytest.raises(ConfigError, match=r"^adapter is 'linear'; use a function"):
            decorr_fx.register_layer(Einsum, "linear")
        assert adapters.adapter_of(Einsum()) is None


def checked(x: Tensor) -> Tensor:
    if not x.isfinite().all():
        raise ValueError("not finite")
    return x


@fx.wrap
def wrapped_check(x: Tensor) -> Tensor:
    return checked(x)


def branching_adapter(self: Einsum, x: Tensor) -> Tensor:
    return F.linear(checked(x), self.weight, self.bias)


def wrapping_adapter(self: Einsum, x: Tensor) -> Tensor:
    return F.linear(wrapped_check(x), self.weight, self.bias)


class TestWhatAGraphDoesNotShow:
    @pytest.mark.parametrize("adapter", [branching_adapter, wrapping_adapter])
    def test_an_adapter_may_branch_and_call_what_is_wrapped(self, adapter: Callable[..., Tensor]) -> None:
        decorr_fx.register_layer(Einsum, adapter)
        assert_trains_and_folds(beside_a_linear(Einsum()), ["0", "2"])
        with pytest.raises(ValueError, match="not finite"):
            decorr_fx.transform(Einsum())(torch.full((1, D_IN), torch.inf))

    def test_one_that_cannot_be_traced_leaves_the_layer_with_the_reason(self) -> None:
        decorr_fx.register_layer(Einsum, lambda self, x: {0: F.linear}[x](x, self.weight, self.bias))
        plain, x = beside_a_linear(Einsum()), torch.randn(9, D_IN)
        model = decorr_fx.transform(plain)
        (skipped,) = decorr_fx.report(model).skipped
        assert skipped.fqn == "0" and "cannot be traced" in skipped.reason
        assert type(model[0]) is Einsum
        assert torch.equal(model(x), plain(x))

    def test_eval_mode_and_steps_at_which_R_does_not_move_run_the_layer_s_own_forward(self) -> None:
        calls: list[int] = []

        def counting_adapter(self: Einsum, x: Tensor) -> Tensor:
            calls.append(1)
            return F.linear(x, self.weight, self.bias)

        decorr_fx.register_layer(Einsum, counting_adapter)
        model, x = decorr_fx.transform(Einsum()), torch.randn(9, D_IN)
        calls.clear()  # of the trace
        model.eval()(x)
        with decorr_fx.paused(model.train()):
            model(x)
        assert not calls
        model(x)
        assert len(calls) == 1


SIZES = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LARGER = SIZES | {"intermediate_size": 24, "max_position_embeddings": 12}
PEFT = {
    "bert": (lambda: BertModel(BertConfig(**LARGER)), ["query", "value"]),
    "llama": (lambda: LlamaModel(LlamaConfig(**LARGER)), ["q_proj", "v_proj"]),
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(("make", "targets"), PEFT.values(), ids=PEFT)
def test_lora_of_peft_trains_its_own_R_and_folds_and_merges(make: Callable[[], nn.Module], targets: list[str]) -> None:
    config = LoraConfig(r=3, target_modules=targets, lora_dropout=0.1, init_lora_weights=False)
    plain = get_peft_model(make(), config)
    model, ids = decorr_fx.transform(copy.deepcopy(plain)), torch.randint(20, (4, 7))
    report = decorr_fx.report(model)
    names = [site.fqn for site in report.sites]
    assert len(names) == 11  # 7 linears, and 2 of LoRA for each of the 2 targets
    assert not report.skipped
    for part in ("base_layer", "lora_A.default", "lora_B.default"):
        assert sum(name.endswith(part) for name in names) == len(targets)
    found = []
    for each in (plain, model):
        torch.manual_seed(1)
        found.append(each.train()(input_ids=ids).last_hidden_state)
    assert torch.equal(*found)
    slopes = torch.linspace(0, 1, 16)  # a norm at the end leaves no gradient for the plain sum of squares
    for each in (model, plain):
        torch.manual_seed(1)
        train(each, lambda each=each: each(input_ids=ids).last_hidden_state * slopes)
    shared = {site.fqn: site.shares_with for site in report.sites if site.shares_with}
    for site, counts in zip(sites_of(model), decorr_fx.stats(model), strict=True):
        assert (not is_identity(site)) == (counts.steps > 0) == ("lora_" in counts.fqn)
        assert counts.fqn not in shared
    expected = model.eval()(input_ids=ids).last_hidden_state
    folded = decorr_fx.fold(model)
    assert [type(m) for m in folded.modules()] == [type(m) for m in plain.modules()]
    assert folded.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(folded(input_ids=ids).last_hidden_state, expected)
    merged = folded.merge_and_unload()
    assert not any("lora" in key for key in merged.state_dict())
    assert relative(merged(input_ids=ids).last_hidden_state, expected) < 1e-5
    assert relative(plain.eval()(input_ids=ids).last_hidden_state, expected) > 1e-4  # R did something
