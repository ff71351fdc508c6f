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
from decorr_fx import DecorrConfig
from decorr_fx.ops import reference
from decorr_fx.runtime.site.state import sites_of


def shares(model: nn.Module, config: DecorrConfig | None = None) -> dict[str, str]:
    """Return whose R each layer uses that has none of its own."""
    return {site.fqn: site.shares_with for site in decorr_fx.report(model, config).sites if site.shares_with}


def train(model: nn.Module, x: Tensor, lr: float = 0.01) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
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
    assert shares(nn.Sequential(nn.Identity(), Branches(rule)).get_submodule("1")) == expected
    assert shares(Branches(rule), DecorrConfig(share_inputs=False)) == {}


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
    other = decorr_fx.transform(GatedMlp(), overrides={"up": DecorrConfig(kappa=0.1)})
    assert shares(other) == {}
    assert shares(decorr_fx.transform(GatedMlp(), overrides={"gate": None})) == {}


@pytest.mark.parametrize("center", [False, True])
def test_a_shared_step_is_that_of_the_reference_for_every_weight(center: bool) -> None:
    config = DecorrConfig(rule="dbp", decor_lr=0.1, center=center)
    model = decorr_fx.transform(GatedMlp().double(), config)
    x = torch.randn(9, 6, dtype=torch.float64)
    before = {name: getattr(model, name).weight.detach().clone() for name in ("gate", "up")}
    train(model, x, lr=0.0)
    rows = x - 0.1 * x.mean(0) if center else x
    factors, _, transitions, _ = reference.step_factors(
        [torch.eye(6, dtype=torch.float64)], None, rows, config.rule, config.decor_lr, config.kappa
    )
    site = next(sites_of(model))
    assert len(site.weights) == 2
    torch.testing.assert_close(site.R[0], factors[0])
    for name, W in before.items():
        torch.testing.assert_close(getattr(model, name).weight, reference.retreat_rows(W, transitions))
    assert site.steps == 1  # one recording, one step


def test_a_shared_site_learns_folds_and_loads() -> None:
    plain, x = GatedMlp(), torch.randn(30, 6)
    model = decorr_fx.transform(plain, DecorrConfig(decor_lr=0.1))
    before = model(x)
    train(model, x, lr=0.0)
    torch.testing.assert_close(model(x), before)  # both weights followed
    for _ in range(3):
        train(model, x)
    assert len(list(sites_of(model))) == 2
    assert [key for key in model.state_dict() if key.endswith("decorr.V")] == [
        "gate.weight_decorr.V",
        "down.weight_decorr.V",
    ]
    folded = decorr_fx.fold(model)
    torch.testing.assert_close(folded(x), model(x))
    assert not any("decorr" in name for module in folded.modules() for name in vars(module))
    other = decorr_fx.transform(GatedMlp())
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), model(x))
    other.load_state_dict(plain.state_dict())  # of a plain model: R is the identity again, for both
    assert is_identity(next(sites_of(other)))


def test_a_copy_has_an_R_of_its_own_for_all_its_layers() -> None:
    model, x = decorr_fx.transform(GatedMlp()), torch.randn(30, 6)
    other = copy.deepcopy(model)
    expected = model(x)
    train(other, x)
    torch.testing.assert_close(model(x), expected)
    assert other.up.weight_decorr is other.gate.weight_decorr is not model.gate.weight_decorr
    torch.testing.assert_close(decorr_fx.fold(other)(x), other(x))


def test_R_stands_still_unless_all_its_weights_may_follow() -> None:
    model, x = decorr_fx.transform(GatedMlp(), DecorrConfig(update_every=1)), torch.randn(30, 6)
    optimizer = torch.optim.SGD([*model.gate.parameters(), *model.down.parameters()], lr=0.01)
    model(x).square().mean().backward()
    optimizer.step()
    assert {s.fqn: s.steps for s in decorr_fx.stats(model)} == {"gate": 0, "down": 1}
    model.up.requires_grad_(False)
    train(model, x)
    assert {s.fqn: s.steps for s in decorr_fx.stats(model)} == {"gate": 0, "down": 2}
    torch.testing.assert_close(decorr_fx.fold(model)(x), model(x))


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
    torch.testing.assert_close(decorr_fx.fold(model)(x, memory), model(x, memory))
