import copy
import gc
import io
import linecache
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import MODELS, LayerCase, ModelCase, layer_cases, small_cnn
from factors import is_identity
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import graph_module
from torch.nn.utils import prune

import decorr_fx
from decorr_fx import Crgd, Dbp, NotTransformedError, Power, Rule
from decorr_fx.passes.rewrite.fold import is_changed
from decorr_fx.passes.rewrite.layer import WatchedLayer
from decorr_fx.runtime.site.state import Site, sites_of

models = pytest.mark.parametrize("case", MODELS.values(), ids=MODELS)
RULES = {
    "power": Power(rank=4),
    "dbp": Dbp(decor_lr=0.1),
    "kronecker": Dbp(decor_lr=0.1, structure="kronecker"),
    "block": Crgd(decor_lr=0.1, structure="block"),
    "crgd": Crgd(decor_lr=0.1),
    "follows": Dbp(decor_lr=0.1, structure="full", preserve_function=False),
    "power-follows": Power(rank=4, preserve_function=False),
}


def train(model: nn.Module, x: Tensor, steps: int = 4, lr: float = 0.05) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) ** 2).mean().backward()
        optimizer.step()


def moved(model: nn.Module) -> list[bool]:
    """Tell of every site whether its R has left the identity."""
    return [not is_identity(site) for site in sites_of(model)]


def assert_plain(model: nn.Module, like: nn.Module) -> None:
    """Check that nothing is left of the method: the classes, attributes, hooks and keys are those of a plain model."""
    assert [str(type(m)) for m in model.modules()] == [str(type(m)) for m in like.modules()]  # some made by torch
    assert not any(is_changed(m) or isinstance(m, Site) for m in model.modules())
    assert [set(vars(m)) for m in model.modules()] == [set(vars(m)) for m in like.modules()]
    assert not any(m._forward_hooks for m in model.modules())
    hooks = [[len(m._load_state_dict_pre_hooks) for m in each.modules()] for each in (model, like)]
    assert hooks[0] == hooks[1]  # weight norm has one
    assert list(model.state_dict()) == list(like.state_dict())


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
    assert decorr_fx.report(model).skipped == ()


@models
def test_the_first_step_is_that_of_the_plain_model(case: ModelCase) -> None:
    """R is the identity until it moves, at the end of the first step."""
    plain, x = case.make(), torch.randn(case.shape)
    model = decorr_fx.transform(copy.deepcopy(plain))
    for one in (plain, model):
        torch.manual_seed(1)
        train(one, x, steps=1)
    own = model.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in plain.state_dict().items())
    assert all(moved(model))


@models
def test_the_input_model_is_not_changed_and_parameters_and_buffers_are_shared(case: ModelCase) -> None:
    plain = case.make()
    before = {name: (type(module), module.training, set(vars(module))) for name, module in plain.named_modules()}
    values = copy.deepcopy(plain.state_dict())
    model = decorr_fx.transform(plain).eval()
    after = {name: (type(module), module.training, set(vars(module))) for name, module in plain.named_modules()}
    assert after == before
    assert all(torch.equal(value, values[key]) for key, value in plain.state_dict().items())
    own = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    for name, tensor in [*plain.named_parameters(remove_duplicate=False), *plain.named_buffers(remove_duplicate=False)]:
        assert own[name] is tensor


@models
def test_a_trained_model_folds_into_the_plain_class(case: ModelCase) -> None:
    plain, x = case.make(), torch.randn(case.shape)
    like = copy.deepcopy(plain)
    model = decorr_fx.transform(plain)
    train(model, x)
    assert all(moved(model))
    expected = model.eval()(x)
    folded = decorr_fx.fold(model)
    assert_plain(folded, like)
    assert torch.equal(folded(x), expected)
    assert torch.equal(plain.eval()(x), expected)  # which was given to transform
    assert not {id(p) for p in folded.parameters()} & {id(p) for p in model.parameters()}
    fresh = case.make().eval()
    fresh.load_state_dict(folded.state_dict(), strict=True)
    assert torch.equal(fresh(x), expected)
    train(folded.train(), x)
    assert torch.equal(model(x), expected)  # the transformed model is not changed, and can go on
    train(model.train(), x)
    assert all(site.steps == 8 for site in sites_of(model))


@models
@pytest.mark.parametrize("in_place", [True, False])
def test_a_trained_model_is_folded_where_it_is(case: ModelCase, in_place: bool) -> None:
    plain, x = case.make(), torch.randn(case.shape)
    like = copy.deepcopy(plain)
    model = decorr_fx.transform_(plain) if in_place else decorr_fx.transform(plain)
    assert (model is plain) == in_place
    parameters = list(plain.parameters())
    train(model, x)
    expected = model.eval()(x)
    assert decorr_fx.fold_(model) is model
    assert_plain(model, like)
    assert torch.equal(model(x), expected)
    assert all(own is before for own, before in zip(model.parameters(), parameters, strict=True))
    train(plain, x)  # which has shared its weights all along
    assert torch.equal(model.eval()(x), plain.eval()(x))
    assert [site.fqn for site in decorr_fx.report(decorr_fx.transform_(model)).sites] == list(case.sites)


def test_an_optimizer_steps_a_model_folded_in_place_as_a_plain_one() -> None:
    """Its sites may be held by something: by a traceback, or by somebody who looks at them."""
    model, plain = (nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)) for _ in range(2))
    model, x = decorr_fx.transform(model, Power(cost_budget=100.0)), torch.randn(9, 6)
    held, optimizers = list(sites_of(model)), [torch.optim.SGD(one.parameters(), lr=0.1) for one in (model, plain)]

    def step(one: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        one(x).square().mean().backward()
        optimizer.step()

    for _ in range(3):
        step(model, optimizers[0])
    plain.load_state_dict(decorr_fx.fold_(model).state_dict())
    for one, optimizer in zip((model, plain), optimizers, strict=True):
        step(one, optimizer)
    assert all(map(torch.equal, model.parameters(), plain.parameters()))
    assert [site.schedule.attempts for site in held] == [3, 3]


def test_in_place_goes_with_whatever_holds_the_model_or_its_parts() -> None:
    model = small_cnn()
    holder, part = [model], model[4]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    assert decorr_fx.transform_(model) is holder[0]
    model(torch.randn(5, 3, 8, 8)).square().mean().backward()
    optimizer.step()
    assert part.weight_decorr.steps == 1


def test_an_error_of_transform_in_place_leaves_the_model_as_it_was() -> None:
    model = small_cnn()
    like = copy.deepcopy(model)
    with pytest.raises(decorr_fx.ConfigError):
        decorr_fx.transform_(model, overrides={"nothing": None})
    assert_plain(model, like)


def test_what_is_not_transformed_cannot_be_folded() -> None:
    model = decorr_fx.transform(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    for fold in (decorr_fx.fold, decorr_fx.fold_):
        for plain in (nn.Linear(2, 2), decorr_fx.fold(model), model[1]):
            with pytest.raises(NotTransformedError, match="has no decorrelated layer"):
                fold(plain)


@given(layer_cases(), st.sampled_from(list(RULES)))
@settings(max_examples=150)
def test_any_layer_trains_and_folds(case: LayerCase, name: str) -> None:
    layer, x = case.make(torch.float32)
    like = copy.deepcopy(layer)
    model = decorr_fx.transform(layer, RULES[name])
    assert torch.equal(model(x), like(x))
    train(model, x)
    assert [s.steps + s.refused for s in decorr_fx.stats(model)] == [4]
    folded = decorr_fx.fold(model)
    assert_plain(folded, like)
    assert torch.equal(folded(x), model.eval()(x))
    like.load_state_dict(folded.state_dict(), strict=True)


@given(layer_cases(), st.sampled_from(list(RULES)))
@settings(max_examples=80)
def test_a_step_of_R_leaves_the_function_unless_told_not_to(case: LayerCase, name: str) -> None:
    """Without an optimizer's move: W stands still where the rule says so, and theta does by default."""
    layer, x = case.make(torch.float64)
    model = decorr_fx.transform(layer, RULES[name])
    for _ in range(2):
        before, R = layer.weight.detach().clone(), model.weight_decorr.dense()
        model(x)
        with decorr_fx.stepping(model):
            pass
        if RULES[name].preserve_function:
            assert torch.equal(layer.weight, before)
            continue
        layout = model.weight_decorr.spec.layout
        rows = [rows_of_weight(W, layout.groups, layout.transposed) for W in (before, layer.weight)]
        W = rows[0] @ torch.linalg.inv(R)  # W of theta = W R, which stands still
        torch.testing.assert_close(rows[1], W @ model.weight_decorr.dense())


def rows_of_weight(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """Return a weight as `[groups, d_out, d]`."""
    if transposed:
        cut = weight.detach().unflatten(0, (groups, -1)).transpose(1, 2)
    else:
        cut = weight.detach().unflatten(0, (groups, -1))
    return cut.flatten(2)


class TestCheckpoints:
    def test_one_of_the_plain_model_loads_and_R_stays(self) -> None:
        plain, x = small_cnn(), torch.randn(5, 3, 8, 8)
        model = decorr_fx.transform(small_cnn())
        train(model, x)
        before = decorr_fx.matrices(model)
        model.load_state_dict(copy.deepcopy(plain.state_dict()), strict=True)
        assert torch.equal(model.eval()(x), plain.eval()(x))
        assert all(torch.equal(R, before[fqn]) for fqn, R in decorr_fx.matrices(model).items())

    def test_one_of_a_transformed_model_loads_into_the_plain_one_without_the_keys_of_R(self) -> None:
        model, x = decorr_fx.transform(small_cnn()), torch.randn(5, 3, 8, 8)
        train(model, x)
        keys = decorr_fx.state_keys(model)
        plain = small_cnn()
        plain.load_state_dict({key: value for key, value in model.state_dict().items() if key not in keys})
        assert torch.equal(plain.eval()(x), model.eval()(x))

    @pytest.mark.parametrize("rule", [Power(), Crgd(update_every=3)], ids=["power", "crgd"])
    def test_one_of_a_transformed_model_resumes_bit_for_bit(self, rule: Rule) -> None:
        def losses(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
            found = []
            for _ in range(steps):
                optimizer.zero_grad()
                loss = (model(torch.randn(5, 3, 8, 8)) ** 2).mean()
                loss.backward()
                optimizer.step()
                found.append(loss.item())
            return found

        model = decorr_fx.transform(small_cnn(), rule)
        optimizer = torch.optim.Adam(model.parameters())
        losses(model, optimizer, 4)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
        file = io.BytesIO()
        torch.save(state, file)
        uninterrupted = losses(model, optimizer, 7)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        resumed = decorr_fx.transform(small_cnn(), rule)
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
        for _ in range(3):
            model(torch.ones(5, 3, 8, 8))
        return found

    plain = small_cnn()
    assert all(map(torch.equal, masks(copy.deepcopy(plain)), masks(decorr_fx.transform(plain))))


def test_submodules_called_by_hand_and_hooks_on_them_go_on_working() -> None:
    model = decorr_fx.transform(nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.Linear(6, 2)))
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append("block"))
    model[1].register_forward_hook(lambda *_: calls.append("layer"))
    x = torch.randn(9, 6)
    train(model, x, steps=2)
    assert calls == 2 * ["block", "layer"]
    folded = decorr_fx.fold(model)
    assert torch.equal(folded[0](x), model[0](x))
    folded(x)
    assert calls[-2:] == ["block", "layer"]  # hooks of a user's stay


def test_copies_and_pickles_are_independent_models() -> None:
    model, x = decorr_fx.transform(small_cnn()), torch.randn(5, 3, 8, 8)
    train(model, x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        expected, R = model.eval()(x), decorr_fx.matrices(model)
        assert torch.equal(other.eval()(x), expected)
        assert all(torch.equal(one, R[fqn]) for fqn, one in decorr_fx.matrices(other).items())
        train(other.train(), x)  # moves the R and the weights of the copy only
        assert [int(site.steps) for site in sites_of(other)] == [8, 8, 8, 8]
        assert torch.equal(model.eval()(x), expected)
        assert all(torch.equal(one, R[fqn]) for fqn, one in decorr_fx.matrices(model).items())
        assert torch.equal(decorr_fx.fold(other).eval()(x), other.eval()(x))
        other.load_state_dict(model.state_dict())


@models
def test_a_copy_and_a_pickle_of_any_model_train_on(case: ModelCase) -> None:
    model, x = decorr_fx.transform(case.make()), torch.randn(case.shape)
    others = [copy.deepcopy(model)]
    if not any(nn.utils.parametrize.is_parametrized(module) for module in model.modules()):  # torch refuses those
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        others.append(torch.load(file, weights_only=False))
    for other in others:
        train(other, x)
        assert all(site.steps == 4 for site in sites_of(other)) and all(moved(other))
        assert not any(moved(model))
        assert_plain(decorr_fx.fold(other), case.make())


def test_statistics_and_R_stay_in_float32_when_the_model_is_cast() -> None:
    model = decorr_fx.transform(nn.Linear(6, 4))
    train(model, torch.randn(8, 6))
    U = model.weight_decorr.U.clone()
    model.to(torch.bfloat16)
    assert model.weight.dtype is torch.bfloat16
    assert torch.equal(model.weight_decorr.U, U)
    train(model, torch.randn(8, 6, dtype=torch.bfloat16))
    assert model.weight_decorr.rows.dtype is torch.float32
    assert decorr_fx.fold(model).weight.dtype is torch.bfloat16
    assert model.double().weight_decorr.U.dtype is torch.float64


class TestParts:
    def test_a_child_that_was_transformed_on_its_own_folds_with_its_parent(self) -> None:
        model = nn.Sequential(decorr_fx.transform(nn.Sequential(nn.Linear(6, 6))), nn.Linear(6, 2))
        x = torch.randn(9, 6)
        train(model, x)
        folded = decorr_fx.fold(model)
        assert torch.equal(folded(x), model.eval()(x))
        assert_plain(folded, nn.Sequential(nn.Sequential(nn.Linear(6, 6)), nn.Linear(6, 2)))

    def test_a_branch_folds_though_another_one_has_the_site_of_its_input(self) -> None:
        class TwoHeads(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body, self.auxiliary = nn.Linear(6, 8), nn.Linear(8, 5)
                self.main = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))

            def forward(self, x: Tensor) -> Tensor:
                hidden = self.body(x).relu()
                return torch.cat([self.main(hidden), self.auxiliary(hidden)], -1)

        model, hidden = decorr_fx.transform(TwoHeads()), torch.randn(9, 8)
        shared = {site.fqn: site.shares_with for site in decorr_fx.report(model).sites}
        assert shared["main.0"] == "auxiliary"
        train(model, torch.randn(30, 6))
        expected, cut = model.main(hidden), copy.deepcopy(model)
        cut.auxiliary = nn.Identity()
        for folded in (decorr_fx.fold(model.main), decorr_fx.fold(cut).main):
            assert_plain(folded, TwoHeads().main)
            assert torch.equal(folded(hidden), expected)
        train(cut.main, hidden)  # the site of the removed head is gone, and the model trains on


class TestWhatIsInAModel:
    def test_what_cannot_be_copied_is_an_error_that_says_so_and_no_obstacle_in_place(self) -> None:
        model = nn.Sequential(nn.Linear(2, 2))
        model.lock = threading.Lock()
        with pytest.raises(decorr_fx.ModelError, match=r"Sequential cannot be copied: cannot pickle '_thread.lock'"):
            decorr_fx.transform(model)

    @pytest.mark.parametrize(
        "keep",
        [
            lambda t: t,
            lambda t: [t, {"it": t}],
            lambda t: types.SimpleNamespace(t=t),
            lambda t: torch.distributions.Normal(t, 1.0),
        ],
        ids=["tensor", "list", "namespace", "distribution"],
    )
    def test_what_a_forward_leaves_behind_is_no_hindrance(self, keep: Callable[[Tensor], Any]) -> None:
        class Keeps(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer, self.head, self.kept = nn.Linear(6, 6), nn.Linear(6, 2), None

            def train(self, mode: bool = True) -> None:  # as some do: it returns nothing
                super().train(mode)

            def forward(self, x: Tensor) -> Tensor:
                hidden = self.layer(x)
                self.kept = keep(hidden)
                return self.head(hidden)

        plain, x = Keeps(), torch.randn(4, 6)
        plain(x)
        before = plain.kept
        model = decorr_fx.transform(plain)
        assert plain.kept is before
        train(model, x)
        assert [s.steps for s in decorr_fx.stats(model)] == [4, 4]
        for fold in (decorr_fx.fold, decorr_fx.fold_):
            assert torch.equal(fold(model)(x), model(x))

    def test_a_closure_over_the_module_calls_the_same_weights(self) -> None:
        class Closure(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.proj = nn.Linear(6, 6)
                self.again = lambda x: self.proj(x).tanh()

            def forward(self, x: Tensor) -> Tensor:
                return self.again(self.proj(x))

        plain, x = Closure(), torch.randn(30, 6)
        model = decorr_fx.transform(plain)
        train(model, x)
        assert all(moved(model))
        fresh = Closure()
        fresh.load_state_dict(decorr_fx.fold(model).state_dict())
        assert torch.equal(fresh(x), model(x)) and torch.equal(plain(x), model(x))

    def test_a_layer_that_was_pruned_after_transform_folds_as_it_is(self) -> None:
        model = decorr_fx.transform(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
        train(model, torch.randn(9, 4))
        prune.random_unstructured(model[1], "weight", 0.5)
        folded, x = decorr_fx.fold(model), torch.randn(9, 4)
        assert torch.equal(folded(x), model(x))
        assert prune.is_pruned(folded) and int((folded[1].weight == 0).sum()) == 4

    def test_weights_that_are_written_by_hand_are_the_ones_that_count(self) -> None:
        model, x = decorr_fx.transform(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2))), torch.randn(30, 6)
        train(model, x)
        known = torch.randn(6, 6)
        model[0].weight.data.copy_(known)
        assert torch.equal(decorr_fx.fold(model)[0].weight, known)
        torch.manual_seed(3)
        model[1].reset_parameters()
        torch.manual_seed(3)
        assert torch.equal(decorr_fx.fold(model)[1].weight, nn.Linear(6, 2).weight)


def test_torch_s_own_layers_keep_their_class() -> None:
    model = decorr_fx.transform(small_cnn())
    assert [type(layer) for layer in model[3:6]] == [nn.Conv2d, nn.Conv2d, nn.ReLU]
    assert type(model[8]) is nn.Linear
    assert isinstance(model[0], WatchedLayer)  # circular padding comes before its call
    assert str(model[8]).startswith("Linear(")


def test_nothing_is_left_of_models_that_are_gone() -> None:
    def make() -> None:
        model = decorr_fx.transform(nn.Sequential(nn.Linear(6, 6), MODELS["functional"].make(), nn.Linear(6, 2)))
        decorr_fx.fold(model)

    make()
    gc.collect()
    before = len(linecache.cache), len(graph_module._loader.eval_cache), count_sites()
    for _ in range(3):
        make()
    gc.collect()
    assert (len(linecache.cache), len(graph_module._loader.eval_cache), count_sites()) == before


def count_sites() -> int:
    return sum(issubclass(type(thing), Site) for thing in gc.get_objects())
