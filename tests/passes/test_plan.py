import copy

import pytest
import torch
import torch.nn.functional as F
from cases import MODELS, Functional, small_cnn
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralModel

import decorr_fx
from decorr_fx import ConfigError, Dbp, LayerError, ModelError, Power
from decorr_fx.runtime.site.state import sites_of


def reasons(model: nn.Module, **arguments: object) -> dict[str, str]:
    return {record.fqn: record.reason for record in decorr_fx.report(model, **arguments).skipped}


def with_a_site(module: nn.Module) -> nn.Module:
    return nn.ModuleDict({"it": module, "site": nn.Linear(2, 2)})


def test_the_report_is_the_plan_before_and_the_fact_after() -> None:
    plain = small_cnn()
    arguments = {"rule": Dbp(structure="kronecker"), "overrides": {"8": None}}
    plan = decorr_fx.report(plain, **arguments)
    fact = decorr_fx.report(decorr_fx.transform(plain, **arguments))
    assert plan == fact
    double = nn.Linear(4, 4).double()
    assert decorr_fx.report(double) == decorr_fx.report(decorr_fx.transform(double))
    first = plan.sites[0]
    assert (first.fqn, first.kind, first.d, first.groups, first.structure) == ("0", "conv2d", 27, 1, "kronecker")
    assert first.bytes == 4 * (3 * 3 + 9 * 9)
    default = decorr_fx.report(plain, Power(rank=5)).sites[0]
    assert (default.structure, default.bytes) == ("rank 5", 4 * (5 * 27 + 5 + 2))  # U, its gain, what is remembered
    assert plan.sites[1].groups == 8
    table = str(plan)
    assert "conv2d" in table
    assert "left alone by overrides['8']" in table
    assert str(decorr_fx.report(nn.Linear(2, 2))).count("(root)") == 1


def test_filter_and_overrides_choose_layers_and_settings() -> None:
    seen = []

    def no_linear(module: nn.Module, fqn: str) -> bool:
        seen.append((type(module), fqn))
        return not isinstance(module, nn.Linear)

    model = decorr_fx.transform(
        small_cnn(), filter_fn=no_linear, overrides={"[0-9]": Power(rank=2), "3": Power(rank=1)}
    )
    assert (nn.Linear, "8") in seen
    assert {s.spec.fqn: s.spec.rule.rank for s in sites_of(model)} == {"0": 2, "3": 1, "4": 2}
    assert {r.fqn: r.reason for r in decorr_fx.report(model).skipped} == {"8": "left alone by filter_fn"}


def test_shared_and_tied_layers_have_one_R_over_the_rows_of_all_calls() -> None:
    for name in ("shared", "tied"):
        model = decorr_fx.transform(MODELS[name].make())
        (site,) = set(sites_of(model))
        model(torch.randn(7, 6))
        assert site.seen == 14


def test_a_weight_that_is_also_an_embedding_is_refused_with_the_reason() -> None:
    class TiedEmbedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(9, 4)
            self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(self.embedding(x)))

    assert reasons(TiedEmbedding()) == {"head": "its weight is shared with 'embedding' (Embedding)"}


def test_a_weight_that_is_read_in_two_ways_is_the_same_in_both() -> None:
    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight) + self.weight.square().sum()

    model, x = decorr_fx.transform(Penalised()), torch.randn(9, 4)
    assert decorr_fx.report(model).skipped == ()
    model(x).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert [s.steps for s in decorr_fx.stats(model)] == [1]
    torch.testing.assert_close(decorr_fx.fold(model)(x), model(x))


def test_a_weight_of_two_layers_that_read_it_differently_is_refused() -> None:
    class TwoShapes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.transposed = nn.Conv1d(4, 4, 1), nn.ConvTranspose1d(4, 4, 1)
            self.transposed.weight = self.conv.weight
            self.other = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.transposed(self.conv(x)))

    assert "in another way (conv_transpose1d)" in reasons(TwoShapes())["conv"]


def test_weights_with_their_features_elsewhere_are_refused() -> None:
    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.reshape(2, 3, 6).transpose(0, 1).reshape(3, 12).reshape(6, 6).flip(1))

    class Hyper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.make = nn.Linear(6, 12)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.make(x.mean(0)).reshape(2, 6))

    assert "with the features in other places" in reasons(with_a_site(Shuffled()))["it"]
    assert "depends on the input" in reasons(Hyper())[""]


def test_hidden_linears_are_listed_with_the_reason() -> None:
    for module in (nn.LSTM(4, 4), nn.GRUCell(4, 4), nn.Bilinear(3, 3, 2)):
        assert "kernel of its own" in reasons(with_a_site(module))["it"]


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_layer_is_listed_with_the_reason() -> None:
    quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear}, inplace=True)
    assert "quantised" in reasons(with_a_site(quantised))["it.0"]


def test_attention_with_a_forward_of_its_own_is_listed_with_the_reason() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, *args: object, **kwargs: object) -> object:
            return super().forward(*args, **kwargs)

    plain, x = with_a_site(Own(4, 2)), torch.randn(5, 2, 4)
    assert reasons(plain)["it"].startswith("its forward cannot be traced")
    assert "multi_head_attention_forward, cannot be traced" in reasons(plain)["it.out_proj"]
    assert [site.fqn for site in decorr_fx.report(plain).sites] == ["site"]
    model = decorr_fx.transform(plain)
    torch.testing.assert_close(model["it"](x, x, x), plain["it"](x, x, x))
    assert type(model["it"]) is Own


def test_attention_that_calls_that_of_torch_is_listed_with_the_reason() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return super().forward(query, key, value)[0]

    found = reasons(with_a_site(Own(4, 2)))
    assert "decorr_fx.register_layer" in found["it"]
    assert found["it.out_proj"] == "its weight is handed to multi_head_attention_forward in 'it'"


def test_attention_that_makes_its_own_calls_is_a_site() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
            return self.out_proj(F.scaled_dot_product_attention(q, k, v))

    model, x = decorr_fx.transform(Own(4, 2)), torch.randn(5, 2, 4)
    assert [site.fqn for site in decorr_fx.report(model).sites] == ["out_proj", "in_proj_weight"]
    assert decorr_fx.report(model).skipped == ()
    model(x).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert [s.steps for s in decorr_fx.stats(model)] == [1, 1]


def test_experts_in_one_parameter_are_listed_with_the_reason() -> None:
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    found = reasons(MixtralModel(MixtralConfig(vocab_size=20, num_key_value_heads=1, **small)))
    assert "depends on the input of the layer" in found["layers.0.mlp.experts"]


def test_a_weight_that_cannot_be_computed_alone_is_listed_with_the_reason() -> None:
    class Latent(nn.Module):
        """Has a query of its own, and normalises what it may not be given."""

        def __init__(self) -> None:
            super().__init__()
            self.latents, self.norm = nn.Parameter(torch.randn(3, 4)), nn.LayerNorm(4)

        def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
            keys = self.norm(other if bool(x.sum() > 0) else None) + self.latents
            return x @ keys.mT

    assert "cannot be computed" in reasons(with_a_site(Latent()))["it"]


def test_a_layer_behind_a_branch_is_a_site() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight) if x.sum() > 0 else x

    assert reasons(with_a_site(Branching())) == {}


def test_a_product_that_cannot_be_seen_is_listed_with_the_reason() -> None:
    class Unseen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            scale = {9: 2.0}[len(x)]
            return x @ self.weight * scale

    assert reasons(with_a_site(Unseen()))["it"].startswith("its forward cannot be traced: ")


def test_a_model_on_the_meta_device_is_filled_from_a_checkpoint() -> None:
    def make(device: str) -> nn.Module:
        attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, device=device)
        return nn.Sequential(nn.Linear(4, 8, device=device), attention)

    plain = make("cpu").eval()
    model = decorr_fx.transform(make("meta"))
    assert {site.fqn for site in decorr_fx.report(model).sites} == {s.fqn for s in decorr_fx.report(plain).sites}
    assert decorr_fx.report(model).skipped == ()
    model.to_empty(device="cpu").load_state_dict(plain.state_dict())
    x = torch.randn(3, 5, 4)
    torch.testing.assert_close(model.eval()(x), plain(x))
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-3)
    model(x).square().mean().backward()
    optimizer.step()
    assert all((s.steps, s.refused) == (1, 0) for s in decorr_fx.stats(model))


def test_weights_that_are_handed_to_functional_attention_are_listed_with_the_reason() -> None:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.out = nn.Linear(4, 4), nn.Linear(4, 4)
            self.packed = nn.Parameter(torch.randn(12, 4))

        def forward(self, x: Tensor) -> Tensor:
            settings = {"need_weights": False, "use_separate_proj_weight": False}
            return F.multi_head_attention_forward(
                x, x, x, 4, 2, self.packed, None, None, None, False, 0.0, self.out.weight, self.out.bias, **settings
            )[0] + self.q(x)

    found = reasons(with_a_site(Pool()))
    assert found["it.out"] == "its weight is handed to multi_head_attention_forward in 'it'"
    assert "it.q" not in found
    plain, x = with_a_site(Pool()), torch.randn(5, 2, 4)
    torch.testing.assert_close(decorr_fx.transform(plain)["it"](x), plain["it"](x))


def test_arguments_that_tracing_cannot_give_are_no_hindrance() -> None:
    class Ragged(nn.Module):
        """Wants a list of lengths, a function and a dict."""

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.layer = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 4)

        def forward(self, x: Tensor, lengths: list[int], act: object, **options: float) -> Tensor:
            parts = [F.linear(part, self.weight) for part in x.split(lengths)]
            return self.layer(act(torch.cat(parts) * options["scale"]))

    plain, x = Ragged(), torch.randn(6, 4)
    arguments = (x, [2, 4], torch.tanh)
    expected = plain(*arguments, scale=2.0)
    model = decorr_fx.transform(plain)
    torch.testing.assert_close(model(*arguments, scale=2.0), expected)
    assert [(s.fqn, s.shares_with) for s in decorr_fx.report(model).sites] == [("layer", ""), ("", "")]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model(*arguments, scale=2.0).square().mean().backward()
    optimizer.step()
    assert [s.steps for s in decorr_fx.stats(model)] == [1, 1]
    folded = decorr_fx.fold(model)
    torch.testing.assert_close(folded(*arguments, scale=2.0), model(*arguments, scale=2.0))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_weights_that_a_hook_sets_are_refused_with_the_way_out() -> None:
    module = torch.nn.utils.weight_norm(nn.Linear(4, 4))
    assert "parametrizations.weight_norm" in reasons(with_a_site(module))["it"]


def test_a_frozen_layer_does_not_move() -> None:
    model = decorr_fx.transform(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(9, 4)).sum().backward()
    optimizer.step()
    assert [s.steps for s in decorr_fx.stats(model)] == [0, 1]


class TestErrors:
    def test_what_is_not_a_module(self) -> None:
        for wrong in (None, "resnet18", torch.randn(3)):
            with pytest.raises(ModelError, match=r"expected a torch.nn.Module"):
                decorr_fx.transform(wrong)

    def test_a_model_without_layers(self) -> None:
        with pytest.raises(ModelError, match="no conv or linear"):
            decorr_fx.transform(nn.ReLU())
        with pytest.raises(ModelError, match=r"no conv or linear.*left alone by filter_fn"):
            decorr_fx.transform(nn.Linear(2, 2), filter_fn=lambda module, fqn: False)

    def test_a_model_transformed_twice(self) -> None:
        with pytest.raises(ModelError, match="transformed already"):
            decorr_fx.transform(decorr_fx.transform(nn.Linear(2, 2)))

    def test_compiled_wrapped_and_scripted_models(self) -> None:
        with pytest.raises(ModelError, match="is compiled; transform the plain model"):
            decorr_fx.transform(torch.compile(nn.Linear(2, 2)))
        in_place = nn.Linear(2, 2)
        in_place.compile()
        with pytest.raises(ModelError, match="is compiled"):
            decorr_fx.transform(in_place)
        with pytest.raises(ModelError, match="wrapped in DataParallel"):
            decorr_fx.transform(nn.DataParallel(nn.Linear(2, 2)))

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    def test_a_scripted_model(self) -> None:
        with pytest.raises(ModelError, match="ScriptModule"):
            decorr_fx.transform(torch.jit.script(nn.Linear(2, 2)))

    def test_a_lazy_layer(self) -> None:
        with pytest.raises(LayerError, match=r"layer '1': is lazy.*run the model once"):
            decorr_fx.transform(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)))

    @pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
    def test_weights_that_are_not_real(self, dtype: torch.dtype) -> None:
        layer = nn.Linear(2, 2)
        layer.weight = nn.Parameter(torch.zeros(2, 2, dtype=dtype), requires_grad=dtype.is_complex)
        model = nn.Sequential(layer, nn.Linear(2, 2))
        with pytest.raises(LayerError, match=rf"layer '0': its weight is {str(dtype)[6:]}.*overrides=\{{'0': None\}}"):
            decorr_fx.transform(model)
        assert len(decorr_fx.report(model, overrides={"0": None}).sites) == 1

    def test_patterns_may_name_layers_that_are_skipped_anyway(self) -> None:
        model = with_a_site(nn.MultiheadAttention(4, 2))
        decorr_fx.transform(model, overrides={"it.*": None})
        decorr_fx.transform(small_cnn(), filter_fn=lambda module, fqn: fqn != "0", overrides={"0": None})

    def test_overrides_that_name_nothing_or_are_wrong(self) -> None:
        with pytest.raises(ConfigError, match=r"'fc' matches no layer.*0, 3, 4, 8"):
            decorr_fx.transform(small_cnn(), overrides={"fc": None})
        with pytest.raises(ConfigError, match="no regular expression"):
            decorr_fx.transform(small_cnn(), overrides={"(": None})
        with pytest.raises(ConfigError, match="use a rule, or None"):
            decorr_fx.transform(small_cnn(), overrides={"0": False})
        with pytest.raises(ConfigError, match="rule is 3"):
            decorr_fx.transform(small_cnn(), 3)
        with pytest.raises(ConfigError, match="overrides is"):
            decorr_fx.transform(small_cnn(), overrides=["0"])
        with pytest.raises(ConfigError, match="not a name or a regular expression"):
            decorr_fx.transform(small_cnn(), overrides={0: None})
        with pytest.raises(ConfigError, match="filter_fn is '0'"):
            decorr_fx.transform(small_cnn(), filter_fn="0")

    def test_an_error_leaves_the_model_as_it_was(self) -> None:
        model = Functional()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ConfigError):
            decorr_fx.transform(model, overrides={"nothing": None})
        assert type(model) is Functional
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_a_report_with_settings_on_a_transformed_model(self) -> None:
        with pytest.raises(ConfigError, match="transformed already"):
            decorr_fx.report(decorr_fx.transform(nn.Linear(2, 2)), Power())
