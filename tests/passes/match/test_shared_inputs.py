"""Layers that read the same value share one R: who does, and that the step of it is right for all of them."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from cases import GatedMlp
from factors import is_identity
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5Model

import decorr_fx
from decorr_fx import Dbp, Power, Rule
from decorr_fx.ops import reference
from decorr_fx.runtime.site.state import sites_of


def shares(model: nn.Module, rule: Rule | None = None) -> dict[str, str]:
    """Return whose R each layer uses that has none of its own."""
    return {site.fqn: site.shares_with for site in decorr_fx.report(model, rule).sites if site.shares_with}


def train(model: nn.Module, x: Tensor, lr: float = 0.01) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


class Branches(nn.Module):
    """A user's forward; what it does with its three layers is given."""

    def __init__(self, forward: object) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))
        self.rule = forward

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        return self.rule(self, x, memory)


class Caller(nn.Module):
    """Passes both inputs on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, memory: Tensor | None = None, **options: Any) -> Tensor:
        return self.inner(nn.functional.relu(x), memory, **options)


def one_after_the_other(self: Branches, x: Tensor, memory: Tensor | None) -> Tensor:
    return self.v(self.k(self.q(x)))


def all_on_one(self: Branches, x: Tensor, memory: Tensor | None) -> Tensor:
    return self.q(x) + self.k(x) + self.v(x)


def on_equal_values(self: Branches, x: Tensor, memory: Tensor | None) -> Tensor:
    return self.q(x + 1) + self.k(x + 1)


def twice(self: Branches, x: Tensor, memory: Tensor | None) -> Tensor:
    return self.q(x) + self.k(x) + self.k(x.tanh())


def behind_a_branch(self: Branches, x: Tensor, memory: Tensor | None) -> Tensor:
    rows = (*x.shape[:-1], 2, 2)
    out = self.q(x).view(rows) * self.k(x).view(rows)
    return out if x.sum() > 0 else -out


def cross_or_self(self: Branches, x: Tensor, memory: Tensor | None) -> Tensor:
    source = x if memory is None else memory
    k = self.k(source) if bool((x > 0).any()) else self.k(source) * 2
    return self.q(x) + k + self.v(source)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (one_after_the_other, {}),
        (all_on_one, {"k": "q", "v": "q"}),
        (on_equal_values, {}),
        (twice, {}),
        (behind_a_branch, {"k": "q"}),
        (cross_or_self, {"v": "k"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_who_shares(rule: object, expected: dict[str, str]) -> None:
    assert shares(Branches(rule)) == expected
    inside = {f"inner.{fqn}": f"inner.{other}" for fqn, other in expected.items()}
    assert shares(Caller(Branches(rule))) == inside
    assert shares(Branches(rule), Power(share_inputs=False)) == {}


class SelfAttention(Caller):
    """Passes one input on, and says nothing of the other."""

    def forward(self, x: Tensor, memory: Tensor | None = None, **options: Any) -> Tensor:
        return self.inner(nn.functional.relu(x))


def test_a_way_that_no_caller_takes_does_not_count() -> None:
    assert shares(SelfAttention(Branches(cross_or_self))) == {"inner.k": "inner.q", "inner.v": "inner.q"}
    handed_on = nn.Sequential(Caller(Branches(cross_or_self)))  # which passes no memory to the caller
    assert shares(handed_on) == {"0.inner.k": "0.inner.q", "0.inner.v": "0.inner.q"}


def decorated(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return wrapper


def test_layers_of_a_decorated_forward_share_too() -> None:
    """As transformers decorates its attention, whose forward takes further keywords."""

    class Decorated(Branches):
        @decorated
        def forward(self, x: Tensor, memory: Tensor | None = None, **kwargs: Any) -> Tensor:
            return all_on_one(self, x, memory)

    assert shares(Decorated(None)) == {"k": "q", "v": "q"}


def test_real_models_share_what_they_should() -> None:
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=20, **small))
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    assert shares(llama) == {
        f"{attention}.k_proj": f"{attention}.q_proj",
        f"{attention}.v_proj": f"{attention}.q_proj",
        f"{mlp}.up_proj": f"{mlp}.gate_proj",
    }
    assert shares(torchvision.models.resnet50()) == {"layer1.0.downsample.0": "layer1.0.conv1"}
    t5 = T5Model(T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=20))
    cross = "decoder.block.0.layer.1.EncDecAttention"
    assert shares(t5)[f"{cross}.v"] == f"{cross}.k"  # the query comes from elsewhere
    assert f"{cross}.k" not in shares(t5)


def test_layers_that_are_set_or_trained_otherwise_do_not_share() -> None:
    frozen = GatedMlp()
    frozen.up.requires_grad_(False)
    assert shares(frozen) == {}
    other = decorr_fx.transform(GatedMlp(), overrides={"up": Power(rank=3)})
    assert shares(other) == {}
    assert shares(decorr_fx.transform(GatedMlp(), overrides={"gate": None})) == {}


def test_only_the_first_weight_of_a_group_records() -> None:
    model, x = decorr_fx.transform(GatedMlp()), torch.randn(9, 6)
    model(x)
    assert [site.spec.fqn for site in sites_of(model)] == ["gate", "down"]
    assert [int(site.seen) for site in sites_of(model)] == [9, 9]
    assert not model.up._forward_hooks and not any("decorr" in name for name in vars(model.up))


def test_the_step_of_an_optimizer_is_that_of_the_reference_for_every_weight() -> None:
    rule = Dbp(decor_lr=0.1)
    model, lr = decorr_fx.transform(GatedMlp().double(), rule), 0.5
    reference_model = copy.deepcopy(decorr_fx.fold(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    R = {"gate": torch.eye(6, dtype=torch.float64), "down": torch.eye(8, dtype=torch.float64)}
    for _ in range(3):
        x = torch.randn(9, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
        for one in (model, reference_model):
            one.zero_grad()
            one(x).square().mean().backward()
        optimizer.step()
        hidden = torch.sigmoid(reference_model.gate(x)) * reference_model.up(x)
        with torch.no_grad():
            for name, of_site in (("gate", "gate"), ("up", "gate"), ("down", "down")):
                layer, R_of = getattr(reference_model, name), R[of_site]
                moved = layer.weight - lr * reference.gradient_to_z(layer.weight.grad, R_of)
                layer.weight.copy_(reference.move_to_x(layer.weight, moved, R_of))
                layer.bias -= lr * layer.bias.grad
        for name, rows in (("gate", x), ("down", hidden.detach())):
            (R[name],), _ = reference.step_factors([R[name]], None, rows, rule, rule.decor_lr)
        for name, R_of in R.items():
            torch.testing.assert_close(getattr(model, name).weight_decorr.R[0], R_of)
        for key, value in reference_model.state_dict().items():
            torch.testing.assert_close(model.state_dict()[key], value)
    assert [int(site.steps) for site in sites_of(model)] == [3, 3]  # one recording, one step


def test_a_shared_site_folds_and_loads() -> None:
    plain, x = GatedMlp(), torch.randn(30, 6)
    model = decorr_fx.transform(copy.deepcopy(plain))
    for _ in range(3):
        train(model, x)
    keys = [key for key in model.state_dict() if key.endswith("decorr.U")]
    assert keys == ["gate.weight_decorr.U", "down.weight_decorr.U"]
    folded = decorr_fx.fold(model)
    assert torch.equal(folded(x), model(x))
    assert not any("decorr" in name for module in folded.modules() for name in vars(module))
    other = decorr_fx.transform(GatedMlp())
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    for fqn, R in decorr_fx.matrices(model).items():
        assert torch.equal(decorr_fx.matrices(other)[fqn], R)
    other.load_state_dict(plain.state_dict())  # of a plain model: R stays
    assert torch.equal(other(x), plain(x))
    assert not any(is_identity(site) for site in sites_of(other))


def test_a_copy_has_an_R_of_its_own_for_all_its_layers() -> None:
    model, x = decorr_fx.transform(GatedMlp()), torch.randn(30, 6)
    other = copy.deepcopy(model)
    expected = model(x)
    train(other, x)
    assert torch.equal(model(x), expected)
    assert is_identity(model.gate.weight_decorr) and not is_identity(other.gate.weight_decorr)
    owners = {id(weight.owner) for weight in other.gate.weight_decorr.weights}
    assert owners == {id(other.gate), id(other.up)}
    assert torch.equal(decorr_fx.fold(other)(x), other(x))


def test_weights_of_one_R_may_belong_to_several_optimizers() -> None:
    class ActorCritic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.actor, self.critic = (nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, n)) for n in (2, 1))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.actor(x), self.critic(x)], -1)

    model = decorr_fx.transform(ActorCritic())
    assert shares(model) == {"critic.0": "actor.0"}
    optimizers = [torch.optim.Adam(part.parameters()) for part in (model.actor, model.critic)]
    for _ in range(30):
        model(torch.randn(64, 6)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert all(site.steps > 0 and not is_identity(site) for site in sites_of(model))


def test_a_frozen_weight_of_a_shared_R_stands_still_and_the_others_move() -> None:
    model, x = decorr_fx.transform(GatedMlp(), Power(update_every=1)), torch.randn(30, 6)
    model.up.requires_grad_(False)
    before = model.up.weight.clone()
    for _ in range(2):
        train(model, x)
    assert torch.equal(model.up.weight, before)
    assert {s.fqn: s.steps for s in decorr_fx.stats(model)} == {"gate": 2, "down": 2}
    model.requires_grad_(True).gate.requires_grad_(False)  # the one that records
    train(model, x)
    assert {s.fqn: s.steps for s in decorr_fx.stats(model)} == {"gate": 3, "down": 3}


def test_packed_weights_share_by_their_parts() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Parameter(torch.randn(12, 4))

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            q, k, v = self.qkv.chunk(3)
            return F.linear(x, q) + F.linear(memory, k) * F.linear(memory, v)

    plain = Packed()
    assert shares(plain) == {"qkv[8:12]": "qkv[4:8]"}
    model = decorr_fx.transform(plain)
    x, memory = torch.randn(9, 4), torch.randn(9, 4)
    model(x, memory).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    assert [s.steps for s in decorr_fx.stats(model)] == [1, 1]
    assert [int(site.rows_of_step()) for site in sites_of(model)] == [0, 0]
    model(x, memory)
    rows = [site.rows[:9].sort(0).values for site in sites_of(model)]
    assert torch.equal(rows[0], x.sort(0).values) and torch.equal(rows[1], memory.sort(0).values)
    assert torch.equal(decorr_fx.fold(model)(x, memory), model(x, memory))
