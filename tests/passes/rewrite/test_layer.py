"""A forward that calls a weight itself runs as its author wrote it, and its inputs are recorded all the same."""

import copy
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import MODELS, ReadsItsChild, SamePaddedConv2d, StandardizedConv2d
from factors import is_identity
from torch import Tensor, nn

import decorr_fx
from decorr_fx import Power
from decorr_fx.passes.rewrite.layer import WatchedLayer
from decorr_fx.runtime.site.state import sites_of


class Straight(torch.autograd.Function):
    """Rounds, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad


def custom_backward(self: nn.Module, x: Tensor) -> Tensor:
    return F.linear(Straight.apply(x), self.weight)


def in_autocast(self: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.linear(x, self.weight)


def counting(self: nn.Module, x: Tensor) -> Tensor:
    self.calls += 1
    return F.linear(x, self.weight) * self.calls


def counting_in_a_buffer(self: nn.Module, x: Tensor) -> Tensor:
    self.count += 1
    return F.linear(x, self.weight) * self.count


def counting_in_a_tensor(self: nn.Module, x: Tensor) -> Tensor:
    self.scale += 1
    return F.linear(x, self.weight) * self.scale


def remembering(self: nn.Module, x: Tensor) -> Tensor:
    self.last = F.linear(x, self.weight)
    return self.last


def remembering_in_a_list(self: nn.Module, x: Tensor) -> Tensor:
    self.log.append(len(x))
    return F.linear(x, self.weight)


def chance(self: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, self.weight) * (0.5 if random.random() < 0.5 else 1.0)


def chance_of_numpy(self: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, self.weight) * float(np.random.rand())


def noisy_weight(self: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, self.weight * (1 + torch.randn(4, 4)))


def dropped_weight(self: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, F.dropout(self.weight, 0.5, self.training))


def scaled_weight(self: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, self.weight * torch.tensor(0.5))


def cast_weight(self: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x.to(torch.bfloat16), self.weight.to(torch.bfloat16)).float()


def asking_for_a_type(self: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x if isinstance(x, Tensor) else x[0], self.weight)


def asking_in_a_generator(self: nn.Module, *xs: Tensor) -> Tensor:
    return F.linear(xs[0] if all(isinstance(x, Tensor) for x in xs) else -xs[0], self.weight)


def asking_for_the_mode(self: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, self.weight) * (1 if torch.is_grad_enabled() else 2)


def catching(self: nn.Module, x: Tensor) -> Tensor:
    try:
        flip = bool(x.sum() > 0)
    except Exception:
        flip = False
    return F.linear(-x if flip else x, self.weight)


def with_an_optional_output(self: nn.Module, x: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return F.linear(x, self.weight), x if other is None else other


def with_optional_inputs(self: nn.Module, x: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    y = F.linear(x, self.weight)
    return y * 2 if a is not None and b is None else y


def writing_its_weight(self: nn.Module, x: Tensor) -> Tensor:
    if self.training:
        with torch.no_grad():
            self.weight.copy_(F.normalize(self.weight, dim=1))
    return F.linear(x, self.weight)


def over_a_numpy_shape(self: nn.Module, x: Tensor) -> Tensor:
    parts = np.array_split(np.arange(len(x)), 2)
    return torch.cat([F.linear(x[torch.from_numpy(part)], self.weight) for part in parts])


FORWARDS = [
    custom_backward, in_autocast, counting, counting_in_a_buffer, counting_in_a_tensor, remembering,
    remembering_in_a_list, chance, chance_of_numpy, noisy_weight, dropped_weight, scaled_weight, cast_weight,
    asking_for_a_type, asking_in_a_generator, asking_for_the_mode, catching, with_an_optional_output,
    with_optional_inputs, writing_its_weight, over_a_numpy_shape,
]  # fmt: skip
forwards = pytest.mark.parametrize("forward", FORWARDS, ids=lambda f: f.__name__)


def module_with(forward: Callable[..., object]) -> nn.Module:
    module: Any = type("Module", (nn.Module,), {"forward": forward})()
    module.weight = nn.Parameter(torch.randn(4, 4))
    module.calls, module.log, module.scale = 0, [], torch.ones(4)
    module.register_buffer("count", torch.zeros(()))
    return module


def seeded(module: nn.Module, x: Tensor) -> Tensor:
    """Call the module from one state of all random generators."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    out = module(x)
    return out[0] if isinstance(out, tuple) else out


def train(model: nn.Module, x: Tensor, steps: int = 3, run: Callable[..., Any] = seeded) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        run(model, x).square().mean().backward()
        optimizer.step()


@forwards
def test_any_forward_is_a_site_and_computes_what_it_did(forward: Callable[..., object]) -> None:
    plain, x = module_with(forward), torch.randn(9, 4)
    before, reference = copy.deepcopy(plain.state_dict()), copy.deepcopy(plain)
    generators = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()
    model = decorr_fx.transform(plain)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == (generators[0], generators[2])
    assert torch.equal(torch.get_rng_state(), generators[1])
    assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items())
    assert (plain.calls, plain.log, plain.scale.tolist()) == (0, [], [1.0] * 4)
    assert [site.fqn for site in decorr_fx.report(model).sites] == [""] and decorr_fx.report(model).skipped == ()
    got = seeded(model, x)
    assert torch.equal(got, seeded(reference, x))
    assert (model.calls, model.log, model.count) == (reference.calls, reference.log, reference.count)
    assert int(model.weight_decorr.seen) == 9


@forwards
def test_any_forward_learns_and_folds(forward: Callable[..., object]) -> None:
    plain, x = module_with(forward), torch.randn(9, 4)
    model, reference = decorr_fx.transform(copy.deepcopy(plain)), copy.deepcopy(plain)
    for one in (model, reference):
        train(one, x)
    assert [(s.steps, s.refused) for s in decorr_fx.stats(model)] == [(3, 0)]
    assert not is_identity(model.weight_decorr)
    assert not torch.allclose(model.weight, reference.weight)  # R did something
    model.eval()
    folded = decorr_fx.fold(model)
    assert type(folded) is type(plain)
    assert not any("decorr" in name for name in (*folded.state_dict(), *vars(folded)))
    assert torch.equal(seeded(folded, x), seeded(model, x))


def test_without_gradients_nothing_is_recorded() -> None:
    def without_gradient(self: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = F.linear(x, self.weight)
        return y + F.linear(x[:2], self.weight).sum()

    model = decorr_fx.transform(module_with(without_gradient))
    model(torch.randn(9, 4))
    assert model.weight_decorr.seen == 2


class Gated(nn.Linear):
    """Has what a loop may set between steps."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.alpha, self.norm = 1.0, nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y, norm = self.alpha * F.linear(x, self.weight, self.bias), self.norm
        return F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training)


class TestRunAsWritten:
    def test_attributes_are_read_when_it_is_called(self) -> None:
        model = decorr_fx.transform(nn.Sequential(nn.Linear(4, 4), Gated()))
        model[1].alpha = 0.0
        assert not model(torch.randn(8, 4)).any()

    def test_a_child_may_be_in_another_mode(self) -> None:
        plain, x = Gated(), 3 * torch.randn(8, 4)
        model = decorr_fx.transform(copy.deepcopy(plain))
        for one in (plain, model):
            one.train().norm.eval()
        assert torch.equal(model(x), plain(x))
        assert not model.norm.running_mean.any()

    def test_what_it_writes_into_its_weight_stays(self) -> None:
        model = decorr_fx.transform(module_with(writing_its_weight))
        train(model, torch.randn(9, 4))
        model(torch.randn(9, 4))
        torch.testing.assert_close(model.weight.norm(dim=1), torch.ones(4))

    def test_a_train_method_that_writes_weights_is_not_called(self) -> None:
        class Merging(nn.Linear):
            """As the original LoRA: its update is merged into the weight in eval mode."""

            def __init__(self) -> None:
                super().__init__(4, 4)
                self.A, self.B = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(4, 2))
                self.merged = False

            def train(self, mode: bool = True) -> "Merging":
                super().train(mode)
                if mode == self.merged:
                    self.weight.data += (self.B @ self.A) * (-1 if mode else 1)
                    self.merged = not mode
                return self

            def forward(self, x: Tensor) -> Tensor:
                y = F.linear(x, self.weight, self.bias)
                return y if self.merged else y + x @ self.A.T @ self.B.T

        for training in (True, False):
            plain, x = nn.Sequential(nn.Linear(4, 4), Merging()).train(training), torch.randn(9, 4)
            expected, weight = plain(x), plain[1].weight.detach().clone()
            model = decorr_fx.transform(plain)
            assert torch.equal(plain[1].weight, weight) and plain[1].merged is model[1].merged is not training
            assert torch.equal(plain(x), expected) and torch.equal(model(x), expected)
            folded = decorr_fx.fold(model)
            assert torch.equal(folded(x), expected) and folded[1].merged is not training

    def test_threads_get_the_answers_of_one(self) -> None:
        class Repeated(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                if x.isnan().any():
                    return x
                for _ in range(10):
                    x = F.linear(x, self.weight).tanh()
                return x

        model, x = decorr_fx.transform(nn.Sequential(nn.Linear(16, 16), Repeated(16, 16))), torch.randn(32, 16)
        train(model, x)
        expected, wrong = model.eval()(x).detach(), []

        def serve() -> None:
            try:
                wrong.extend(one for _ in range(50) if not torch.equal(one := model(x), expected))
            except Exception as error:
                wrong.append(error)

        threads = [threading.Thread(target=serve) for _ in range(4)]
        for act in (threading.Thread.start, threading.Thread.join):
            for thread in threads:
                act(thread)
        assert not wrong

    @pytest.mark.parametrize(
        ("model", "x"),
        [
            (nn.Conv2d(64, 16, 3, padding=1), torch.randn(4, 8, 6, 6)),
            (nn.Linear(6, 4), torch.randn(4, 5)),
            (nn.ConvTranspose1d(6, 4, 3), torch.randn(4, 5, 5)),
            (StandardizedConv2d(3, 4, 3), torch.randn(4, 5, 6, 6)),
            (MODELS["products"].make(), torch.randn(4, 5)),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_an_input_that_does_not_fit_raises_the_error_of_torch(self, model: nn.Module, x: Tensor) -> None:
        errors = []
        for one in (copy.deepcopy(model), decorr_fx.transform(model)):
            with pytest.raises(Exception) as raised:
                one(x)
            errors.append(repr(raised.value))
        assert errors[1] == errors[0]

    def test_a_layer_may_be_changed_after_transform(self) -> None:
        x = torch.randn(2, 3, 9, 9)
        for plain in (nn.Conv2d(3, 4, 3), SamePaddedConv2d(3, 4, 3), nn.Conv2d(3, 4, 3, padding_mode="circular")):
            model = decorr_fx.transform(copy.deepcopy(plain))
            for one in (plain, model):
                one.stride, one.dilation = (3, 3), (2, 2)
            assert torch.equal(model(x), plain(x))
            weight = torch.eye(27).reshape(27, 3, 3, 3)  # a convolution that copies its patches
            plain.weight, plain.bias = nn.Parameter(weight), None
            patches = plain(x).detach().movedim(1, -1).flatten(0, -2)
            rows = model.weight_decorr.rows[: int(model.weight_decorr.seen)]
            assert len(rows) == len(patches)
            assert all((row - patches).abs().sum(1).min() < 1e-6 for row in rows)

    def test_the_dropout_of_an_attention_may_be_changed_after_transform(self) -> None:
        plain, x = nn.MultiheadAttention(6, 2, dropout=0.9), torch.randn(5, 3, 6)
        model = decorr_fx.transform(copy.deepcopy(plain))
        plain.dropout = model.dropout = 0.0
        torch.testing.assert_close(model(x, x, x), plain(x, x, x))


class TestClasses:
    def test_layers_of_one_class_share_a_class(self) -> None:
        """Torch.compile compiles them once."""
        blocks = [StandardizedConv2d(3, 3, 3, padding=1) for _ in range(3)]
        model = decorr_fx.transform(nn.Sequential(*blocks, SamePaddedConv2d(3, 3, 3)))
        assert len({type(block) for block in model}) == 2
        assert type(decorr_fx.transform(StandardizedConv2d(3, 4, 1))) is type(model[0]) is not StandardizedConv2d

    def test_one_is_a_subclass_that_looks_like_its_own(self) -> None:
        model = decorr_fx.transform(StandardizedConv2d(3, 4, 3))
        assert isinstance(model, WatchedLayer) and isinstance(model, StandardizedConv2d)
        assert type(model).forward.__name__ == "forward"
        assert "input" in type(model).forward.__signature__.parameters

    def test_the_class_is_that_of_the_copy_alone(self) -> None:
        plain = StandardizedConv2d(3, 4, 3)
        decorr_fx.transform(plain)
        assert type(plain) is StandardizedConv2d

    def test_a_wrapper_on_the_instance_goes_on_around_the_layer_s_own_forward(self) -> None:
        """As accelerate and others keep a forward."""
        model, x, calls = decorr_fx.transform(MODELS["functional"].make()), torch.randn(4, 3, 7, 7), []
        inner = model.forward

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return inner(*args, **kwargs)

        model.forward = wrapped
        train(model, x)
        assert [int(site.steps) for site in sites_of(model)] == [3, 3]
        decorr_fx.fold_(model)
        model(x)
        assert len(calls) == 4


class TestWhatIsRecorded:
    def test_a_weight_that_its_parent_reads_too_is_recorded_at_both_calls(self) -> None:
        plain, x = ReadsItsChild(), torch.randn(9, 6)
        model = decorr_fx.transform(plain)
        assert [site.fqn for site in decorr_fx.report(model).sites] == ["body", "head.0"]
        model(x)
        assert model.body.weight_decorr.seen == 18
        rows = model.body.weight_decorr.rows[:18].sort(0).values
        expected = torch.cat([x, plain.head(plain.body(x))]).detach().sort(0).values
        torch.testing.assert_close(rows, expected)

    def test_nothing_is_recorded_where_nothing_moves(self) -> None:
        for make in (lambda: nn.Linear(4, 4), lambda: module_with(asking_for_a_type)):
            model, x = decorr_fx.transform(make(), Power(update_every=4)), torch.randn(9, 4)
            site = model.weight_decorr
            with torch.no_grad():
                model(x)
            model.eval()(x)
            with decorr_fx.paused(model.train()):
                model(x)
            assert site.seen == 0
            model.weight.requires_grad_(False)
            model(x)
            assert site.seen == 0
            model.weight.requires_grad_(True)
            model(x)
            assert site.seen == 9
            seen = []
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            for _ in range(40):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                seen.append(int(site.seen))
                optimizer.step()
            assert int(site.steps) == sum(n > 0 for n in seen) < 30

    def test_products_of_weights_alone_are_no_input(self) -> None:
        def with_a_penalty(self: nn.Module, x: Tensor) -> Tensor:
            gram = self.weight @ self.weight.T
            return F.linear(x, self.weight) + (gram - torch.eye(4)).square().sum()

        model = decorr_fx.transform(module_with(with_a_penalty))
        model(torch.randn(9, 4))
        assert model.weight_decorr.seen == 9

    @pytest.mark.parametrize("name", ["matmul", "@", "mm", "linear", "addmm"])
    def test_products_are_recorded_however_they_are_written(self, name: str) -> None:
        products: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "matmul": lambda x, W: torch.matmul(x, W.T),
            "@": lambda x, W: x @ W.mT,
            "mm": lambda x, W: x.mm(W.t()),
            "linear": F.linear,
            "addmm": lambda x, W: torch.addmm(torch.zeros(4), x, W.transpose(0, 1)),
        }
        x = torch.randn(9, 4)
        model = decorr_fx.transform(module_with(lambda self, x: products[name](x, self.weight)))
        model(x)
        assert torch.equal(model.weight_decorr.rows[:9].sort(0).values, x.sort(0).values)

    def test_an_output_with_as_many_numbers_as_the_weight_is_no_weight(self) -> None:
        def twice(self: nn.Module, x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.weight), self.weight)

        model, x = decorr_fx.transform(module_with(twice)), torch.randn(4, 4)
        model(x)
        assert model.weight_decorr.seen == 8

    def test_what_only_the_code_shows_is_recorded(self) -> None:
        """Of a forward that can be traced up to some place only."""

        class Parent(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer, self.layers = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4)])

            def forward(self, x: Tensor) -> Tensor:
                x = {9: x}[len(x)]
                x = F.linear(x, self.layer.weight)
                for layer in self.layers:
                    x = (layer.weight @ x.mT).mT
                return x

        model, x = decorr_fx.transform(Parent()), torch.randn(9, 4)
        assert [site.fqn for site in decorr_fx.report(model).sites] == ["layer", "layers.0"]
        train(model, x)
        assert [int(site.steps) for site in sites_of(model)] == [3, 3]
        model(x)
        assert [int(site.seen) for site in sites_of(model)] == [9, 9]

    def test_a_weight_that_is_used_as_a_whole_and_in_parts_has_one_R(self) -> None:
        class Packed(nn.Module):
            """As attention has it for queries and keys of one value, or of two."""

            def __init__(self) -> None:
                super().__init__()
                self.qkv = nn.Parameter(torch.randn(12, 4) / 2)

            def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
                if memory is None:
                    q, k, v = F.linear(x, self.qkv).chunk(3, -1)
                else:
                    q_weight, kv_weight = self.qkv.split([4, 8])
                    q, (k, v) = F.linear(x, q_weight), F.linear(memory, kv_weight).chunk(2, -1)
                return q * k + v

        model, x, memory = decorr_fx.transform(Packed()), torch.randn(9, 4), torch.randn(9, 4)
        (site,) = sites_of(model)
        assert site.spec.fqn == "qkv"
        model(x)
        assert site.seen == 9
        model(x, memory)
        assert site.seen == 3 * 9

    @pytest.mark.parametrize("name", ["left", "reshaped", "cut"])
    def test_a_layer_that_its_parent_multiplies_in_another_way_is_recorded(self, name: str) -> None:
        products: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "left": lambda x, W: (W @ x.mT).mT,
            "reshaped": lambda x, W: F.conv1d(x.T[None], W.unsqueeze(2))[0].T,
            "cut": lambda x, W: F.linear(x, W.unflatten(0, (2, 2))[0]),
        }

        class Parent(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                return products[name](x, self.layer.weight)

        model, x = decorr_fx.transform(Parent()), torch.randn(9, 4)
        report = decorr_fx.report(model)
        assert [site.fqn for site in report.sites] == ["layer"] and report.skipped == ()
        train(model, x)
        assert model.layer.weight_decorr.steps == 3
