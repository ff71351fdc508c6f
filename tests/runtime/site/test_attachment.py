"""Checkpoints: plain, partial and transformed ones, and those that do not fit, which change nothing."""

import copy
import warnings

import pytest
import torch
from factors import is_identity
from torch import Tensor, nn

import decorr_fx
from decorr_fx import CheckpointError, Crgd, Dbp, Power, Rule
from decorr_fx.runtime.site.attachment import skipped_of
from decorr_fx.runtime.site.state import sites_of

Checkpoint = dict[str, Tensor]


def plain_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def trained(rule: Rule | None = None, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = decorr_fx.transform(plain_layers(), rule or Power(update_every=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(9, 5)).square().sum().backward()
        optimizer.step()
    assert not any(is_identity(site) for site in sites_of(model))
    return model


def R_of(model: nn.Module) -> dict[str, Tensor]:
    keys = decorr_fx.state_keys(model)
    return {key: value.clone() for key, value in model.state_dict().items() if key in keys}


def assert_same(model: nn.Module, expected: Checkpoint) -> None:
    got = model.state_dict()
    assert all(torch.equal(got[key], value) for key, value in expected.items())


X = torch.randn(7, 5, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("assign", [True, False])
def test_a_plain_checkpoint_loads_and_R_stays(assign: bool) -> None:
    model, plain = trained(), plain_layers()
    before = R_of(model)
    keys = model.load_state_dict(copy.deepcopy(plain.state_dict()), assign=assign)
    assert not keys.missing_keys and not keys.unexpected_keys
    assert torch.equal(model(X), plain(X)) and torch.equal(decorr_fx.fold(model)(X), plain(X))
    assert_same(model, before)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    model(X).square().sum().backward()
    optimizer.step()
    assert decorr_fx.stats(model)[0].steps == 4


def test_a_part_of_a_plain_checkpoint_with_strict_false() -> None:
    model = trained()
    before, expected = R_of(model), model(X).detach()
    keys = model.load_state_dict({"2.bias": model[2].bias.detach().clone(), "other": torch.ones(2)}, strict=False)
    assert keys.unexpected_keys == ["other"] and "0.weight" in keys.missing_keys
    assert not [key for key in keys.missing_keys if "decorr" in key]
    assert torch.equal(model(X), expected)
    model.load_state_dict({"0.weight": torch.ones(4, 5)}, strict=False)
    assert_same(model, before)


def test_a_missing_weight_is_torchs_own_error() -> None:
    model, checkpoint = trained(), plain_layers().state_dict()
    del checkpoint["0.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0.weight"'):
        model.load_state_dict(checkpoint)


@pytest.mark.parametrize("rule", [Power(update_every=1), Power(update_every=1, gain=0.0), Dbp(update_every=1),
                                  Crgd(update_every=1)], ids=["Power", "with gain", "Dbp", "Crgd"])  # fmt: skip
@pytest.mark.parametrize("assign", [True, False])
def test_a_transformed_checkpoint_brings_all_back(rule: Rule, assign: bool) -> None:
    model = trained(rule)
    other = decorr_fx.transform(plain_layers(), rule)
    checkpoint = copy.deepcopy(model.state_dict())
    other.load_state_dict(checkpoint, assign=assign)
    assert_same(other, model.state_dict())
    assert [site.schedule.attempts for site in sites_of(other)] == [3, 3]
    for name, R in decorr_fx.matrices(model).items():
        assert torch.equal(decorr_fx.matrices(other)[name], R)


def test_the_weights_of_a_transformed_checkpoint_load_into_the_plain_model() -> None:
    model, plain = trained(), plain_layers()
    keys = plain.load_state_dict(model.state_dict(), strict=False)
    assert set(keys.unexpected_keys) == decorr_fx.state_keys(model)
    assert torch.equal(plain(X), model(X))
    own = {key: value for key, value in model.state_dict().items() if key not in decorr_fx.state_keys(model)}
    plain_layers().load_state_dict(own)


@pytest.mark.parametrize("part", ["U", "scale", "trace", "steps", "_extra_state"])
def test_a_partial_R_starts_anew_with_one_warning_and_right_weights(part: str) -> None:
    model, checkpoint = trained(), copy.deepcopy(trained(seed=1).state_dict())
    del checkpoint[f"0.weight_decorr.{part}"]
    with pytest.warns(UserWarning, match=rf"layer '0': '0.weight_decorr.{part}' is not in the checkpoint") as said:
        model.load_state_dict(checkpoint)
    assert len(said) == 1
    assert [is_identity(site) for site in sites_of(model)] == [True, False]
    assert [s.steps for s in decorr_fx.stats(model)] == [0, 3]
    assert torch.equal(model[0].weight, checkpoint["0.weight"])


def test_a_branch_gets_the_checkpoint_of_a_branch() -> None:
    """R that two branches share is in the checkpoint of one of them: weights are right without it."""

    class Twin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q1, self.q2 = (nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.q1(x) + self.q2(x)

    net = decorr_fx.transform(Twin(), Power(update_every=1))
    target = copy.deepcopy(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        net(X).square().sum().backward()
        optimizer.step()
    for branch in ("q1", "q2"):
        getattr(target, branch).load_state_dict(getattr(net, branch).state_dict())
        assert torch.equal(getattr(target, branch)(X), getattr(net, branch)(X))


def test_from_the_meta_device_by_assignment() -> None:
    plain = plain_layers()
    with torch.device("meta"):
        model = decorr_fx.transform(plain_layers(), Power(update_every=1))
    model.load_state_dict(plain.state_dict(), assign=True)
    assert all(is_identity(site) and site.rows.device.type == "cpu" for site in sites_of(model))
    for net in (model, model.eval(), decorr_fx.fold(model)):
        assert torch.equal(net(X), plain(X))
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    model(X).square().sum().backward()
    optimizer.step()
    assert [s.steps for s in decorr_fx.stats(model)] == [1, 1]
    assert torch.equal(plain(X), model(X))  # the tensors of the checkpoint are the model's own now


@pytest.mark.parametrize("transformed", [True, False])
def test_from_the_meta_device_with_a_transformed_checkpoint(transformed: bool) -> None:
    model = trained()
    with torch.device("meta"):
        other = decorr_fx.transform(plain_layers(), Power(update_every=1))
    other.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert torch.equal(other(X), model(X))
    assert_same(other, model.state_dict())


def test_loading_says_nothing_where_nothing_is_lost() -> None:
    model = trained()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(model.state_dict())
        model.load_state_dict(decorr_fx.fold(model).state_dict())
        nn.Sequential(model).load_state_dict({f"0.{key}": value for key, value in model.state_dict().items()})


class TestCheckpointErrors:
    def refused(self, model: nn.Module, checkpoint: Checkpoint, match: str) -> None:
        before = copy.deepcopy(model.state_dict())
        for target, named in (
            (model, checkpoint),
            (nn.ModuleList([model]), {f"0.{k}": v for k, v in checkpoint.items()}),
        ):
            for strict in (True, False):
                with pytest.raises(CheckpointError, match=match):
                    target.load_state_dict(named, strict=strict)
        assert_same(model, before)

    def test_R_of_another_rank(self) -> None:
        other = trained(Power(update_every=1, rank=2)).state_dict()
        self.refused(trained(), other, r"layer '0': .*has shape \[1, 2, 5\].*and shape \[1, 5, 5\] in the model")

    def test_R_of_another_structure(self) -> None:
        blocks = copy.deepcopy(trained(Dbp(update_every=1)).state_dict())
        blocks["2.weight_decorr.R"] = torch.eye(2)[None]
        self.refused(trained(Dbp(update_every=1)), blocks, r"layer '2': .*\[1, 2, 2\].*decorr_fx.state_keys")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_R_that_is_not_finite(self, value: float) -> None:
        checkpoint = copy.deepcopy(trained(seed=1).state_dict())
        checkpoint["2.weight_decorr.U"][0, 0, 0] = value
        self.refused(trained(), checkpoint, "layer '2'.*NaN or infinity")

    def test_what_is_no_tensor(self) -> None:
        checkpoint = {**trained(seed=1).state_dict(), "0.weight_decorr.U": [1.0]}
        self.refused(trained(), checkpoint, "layer '0'.*has list in the checkpoint")


def test_of_another_rule_the_weights_load_and_R_starts_anew() -> None:
    checkpoint = trained(Dbp(update_every=1)).state_dict()
    model = trained()
    with pytest.warns(UserWarning, match="layer '0': '0.weight_decorr.U' is not in the checkpoint") as said:
        model.load_state_dict(checkpoint)
    assert len(said) == 1
    assert all(is_identity(site) for site in sites_of(model))
    assert torch.equal(model[0].weight, checkpoint["0.weight"])


def test_skipped_layers_are_kept_at_the_root_until_it_is_folded() -> None:
    model = decorr_fx.transform(plain_layers(), overrides={"2": None})
    assert [record.fqn for record in skipped_of(model)] == ["2"]
    assert skipped_of(decorr_fx.fold(model)) == () == skipped_of(nn.Linear(2, 2))
    folded = decorr_fx.fold_(model)
    checkpoint = {**folded.state_dict(), "0.weight_decorr.U": torch.full((1, 5, 5), torch.nan)}
    assert folded.load_state_dict(checkpoint, strict=False).unexpected_keys == ["0.weight_decorr.U"]
