import copy
import gc
import weakref
from itertools import product

import pytest
import torch
from factors import is_identity
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.utils import prune

import decorr_fx
from decorr_fx import CheckpointError, ConfigError, DecorrConfig, LayerError, ModelError, NotTransformedError
from decorr_fx.ops.sample import GOLDEN
from decorr_fx.runtime.site.state import LIVE_SITES, sites_of


def two_layers(update_every: int = 1, **config: object) -> nn.Module:
    plain = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    return decorr_fx.transform(plain, DecorrConfig(update_every=update_every, **config))


def one_step(model: nn.Module, x: torch.Tensor, lr: float = 0.0) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    model(x).square().sum().backward()
    optimizer.step()


def everything(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


@pytest.mark.parametrize("max_samples", [256, 4], ids=["more rows than features", "fewer"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_rows_that_are_not_finite_are_refused_and_counted(value: float, max_samples: int) -> None:
    model = two_layers(max_samples=max_samples)
    x = torch.randn(9, 5)
    x[:, 2] = value
    before = everything(model)
    model(x)
    decorr_fx.step(model)
    stats = decorr_fx.stats(model)
    assert (stats[0].steps, stats[0].refused) == (0, 1)
    for key in ("0.weight", "0.weight_decorr.V", "0.weight_decorr.scale"):
        assert torch.equal(model.state_dict()[key], before[key])
    one_step(model, torch.randn(9, 5))
    assert (decorr_fx.stats(model)[0].steps, decorr_fx.stats(model)[0].refused) == (1, 1)


@pytest.mark.parametrize("max_samples", [256, 3], ids=["more rows than features", "fewer"])
def test_no_row_no_step(max_samples: int) -> None:
    model = two_layers(max_samples=max_samples)
    decorr_fx.step(model)
    assert [(s.steps, s.refused) for s in decorr_fx.stats(model)] == [(0, 0), (0, 0)]


@pytest.mark.parametrize("rule", ["dbp", "dbp-normalized", "crgd", "power"])
@pytest.mark.parametrize("x", [torch.zeros(6, 5), torch.ones(6, 5), torch.full((1, 5), 1e4), 1e-20 * torch.ones(6, 5)])
def test_degenerate_rows_leave_R_finite(rule: str, x: torch.Tensor) -> None:
    model = two_layers(rule=rule, decor_lr=1e6)
    for _ in range(50):
        one_step(model, x)
    assert all(f.isfinite().all() for site in sites_of(model) for f in site.factors)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("rule", "structure"), [("power", "auto"), *product(["dbp", "crgd"], ["full", "kronecker"])])
def test_a_step_never_waits_for_the_device(rule: str, structure: str) -> None:
    """A fake tensor has no value: reading one on the host, as a sync does, raises."""
    with FakeTensorMode():
        model = decorr_fx.transform(nn.Conv1d(6, 4, 3), DecorrConfig(rule=rule, structure=structure, center=True))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            model(torch.randn(5, 6, 9)).sum().backward()
            optimizer.step()
        with pytest.raises(DataDependentOutputException):
            decorr_fx.stats(model)


@pytest.mark.parametrize("update_every", [2, 8])
def test_moves_do_not_keep_in_step_with_a_cycle_of_the_loop(update_every: int) -> None:
    """A layer that is used at every other step, or an optimizer that wraps another, must not fall between the moves."""
    model = two_layers(update_every=update_every)
    for site in sites_of(model):
        site.attempts = update_every**2  # past the first steps, at which R moves more often
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(80):
        one_step(model, torch.randn(9, 5))
        optimizer.step()
    assert decorr_fx.stats(model)[0].steps == pytest.approx(80 / update_every, rel=0.1)


def test_frozen_layers_forget_their_rows() -> None:
    model = two_layers()
    model[0].requires_grad_(False)
    one_step(model, torch.randn(9, 5))
    assert model[0].weight_decorr.seen == 0


def test_a_copy_made_while_paused_is_not_paused() -> None:
    model = two_layers()
    with decorr_fx.paused(model):
        other = copy.deepcopy(model)
    one_step(other, torch.randn(9, 5))
    assert decorr_fx.stats(other)[0].steps == 1


def test_a_partial_checkpoint_resets_only_what_it_holds() -> None:
    model = two_layers()
    x = torch.randn(9, 5)
    one_step(model, x)
    expected = model(x)
    model.load_state_dict({"2.bias": model[2].bias.clone(), "other.weight": torch.ones(2)}, strict=False)
    assert torch.equal(model(x), expected)
    model.load_state_dict({"0.weight": model[0].weight.clone()}, strict=False)
    assert [is_identity(site) for site in sites_of(model)] == [True, False]


def test_a_weight_that_was_pruned_after_the_transform_cannot_be_folded() -> None:
    model = two_layers()
    prune.l1_unstructured(model[0], "weight", 0.5)
    one_step(model, torch.randn(9, 5), lr=0.1)
    assert decorr_fx.stats(model)[0].steps == 0
    with pytest.raises(LayerError, match="layer '0': its weight was pruned or parametrized after transform"):
        decorr_fx.fold(model)


def test_weights_that_are_not_tied_any_more_are_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    checkpoint = {key: value.clone() for key, value in model.state_dict().items()}
    transformed = decorr_fx.transform(model)
    transformed.load_state_dict(checkpoint, assign=True)
    with pytest.raises(LayerError, match="layer '0': the weights that were tied to it are not any more"):
        decorr_fx.fold(transformed)


@pytest.mark.parametrize("update_every", [1, 8])
def test_recorded_rows_are_not_saved(update_every: int) -> None:
    model = two_layers(update_every=update_every)
    model(torch.randn(3, 5))
    assert not [key for key in model.state_dict() if "rows" in key or "seen" in key]
    model.load_state_dict(model.state_dict())
    assert model[0].weight_decorr.seen == 0


def test_an_optimizer_of_another_model_is_not_disturbed() -> None:
    model = two_layers()
    del model[0].weight
    one_step(two_layers(), torch.randn(9, 5))


def test_a_forward_on_the_meta_device() -> None:
    model = decorr_fx.transform(nn.Linear(5, 4)).to("meta")
    assert model(torch.randn(3, 5, device="meta")).shape == (3, 4)


def test_update_every_moves_R_at_one_of_three_steps_and_at_each_of_the_first() -> None:
    model = two_layers(update_every=3)
    taken = []
    for _ in range(30):
        one_step(model, torch.randn(9, 5))
        taken.append(decorr_fx.stats(model)[0].steps)
    moved = [step for step, (before, after) in enumerate(zip([0, *taken], taken, strict=False)) if after > before]
    assert moved == [step for step in range(30) if step * GOLDEN % 1 < 1 / min(3, 1 + step // 3)]
    assert moved[:3] == [0, 1, 2] and len([step for step in moved if step >= 6]) == 8


def test_rows_are_recorded_only_where_R_moves_at_the_coming_step() -> None:
    model = two_layers(update_every=3)
    seen = []
    for _ in range(4):
        model(torch.randn(9, 5))
        seen.append(int(model[0].weight_decorr.seen))
        decorr_fx.step(model)
    assert seen == [9, 9, 9, 0]


def test_decor_lr_may_depend_on_the_step() -> None:
    asked: list[int] = []

    def schedule(step: int) -> float:
        asked.append(step)
        return 0.1 if step == 4 else 0.0

    model = two_layers(rule="dbp", decor_lr=schedule, update_every=2)
    x = torch.randn(9, 5)
    eye = torch.eye(5)
    still = []
    for _ in range(6):
        one_step(model, x)
        still.append(torch.equal(model[0].weight_decorr.R[0], eye))
    assert still == [True, True, True, True, False, False]
    assert sorted(set(asked)) == [0, 1, 2, 3, 4, 5]


def test_a_schedule_that_returns_nonsense_is_an_error() -> None:
    model = two_layers(decor_lr=lambda step: -1.0)
    with pytest.raises(ConfigError, match=r"decor_lr\(0\) returned -1.0"):
        one_step(model, torch.randn(9, 5))


def test_paused_keeps_R_and_drops_the_rows() -> None:
    model = two_layers()
    before = everything(model)
    with decorr_fx.paused(model):
        one_step(model, torch.randn(9, 5))
        decorr_fx.step(model)
    decorr_fx.step(model)
    for key in ("0.weight", "0.weight_decorr.V", "2.weight_decorr.V", "2.weight_decorr.steps"):
        assert torch.equal(model.state_dict()[key], before[key])
    one_step(model, torch.randn(9, 5))
    assert decorr_fx.stats(model)[0].steps == 1
    with pytest.raises(RuntimeError, match="inside"), decorr_fx.paused(model):
        raise RuntimeError("inside")
    assert not any(site.paused for site in sites_of(model))


def test_stats_tell_how_correlated_the_rows_are() -> None:
    model = two_layers(rule="dbp", decor_lr=0.2)
    x = torch.randn(400, 5) @ torch.randn(5, 5)
    one_step(model, x)
    first = decorr_fx.stats(model)[0]
    for _ in range(300):
        one_step(model, x)
    last = decorr_fx.stats(model)[0]
    assert last.fqn == "0"
    assert last.correlation < 0.01 * first.correlation
    assert last.variance_error < 0.01 * first.variance_error
    assert "variance error" in str(decorr_fx.stats(model))


def test_half_precision_autocast_keeps_statistics_in_float32() -> None:
    model = two_layers()
    x = torch.randn(9, 5)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
        out.float().square().sum().backward()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer.step()
    assert out.dtype is torch.bfloat16
    expected = two_layers()
    assert model[0].weight_decorr.V.dtype is expected[0].weight_decorr.V.dtype is torch.float32
    assert torch.equal(model[0].weight_decorr.rows[:9].sort(0).values, x.sort(0).values)


def test_the_step_builds_no_autograd_graph_and_models_are_collected() -> None:
    model = two_layers()
    one_step(model, torch.randn(9, 5))
    assert not any(f.requires_grad for site in sites_of(model) for f in site.factors)
    gc.collect()
    before, gone = len(LIVE_SITES), weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert len(LIVE_SITES) == before - 2


class TestCheckpointErrors:
    def refused(self, model: nn.Module, checkpoint: dict[str, torch.Tensor], match: str) -> None:
        before = everything(model)
        with pytest.raises(CheckpointError, match=match):
            model.load_state_dict(checkpoint)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_R_of_another_shape(self) -> None:
        other = two_layers(rank=2)
        self.refused(two_layers(), other.state_dict(), r"layer '0': .*has shape \[1, 2, 5\].*and \[1, 5, 5\]")

    def test_R_of_another_structure(self) -> None:
        conv = nn.Sequential(nn.Conv1d(4, 4, 3))
        pair = decorr_fx.transform(conv, DecorrConfig(rule="dbp", structure="kronecker")).state_dict()
        self.refused(decorr_fx.transform(conv), pair, "'0.weight_decorr.A' of the checkpoint is not in the model")

    def test_a_checkpoint_with_a_mean(self) -> None:
        centered = two_layers(center=True).state_dict()
        self.refused(two_layers(), centered, "layer '0': '0.weight_decorr.mean' of the checkpoint is not in the model")
        self.refused(two_layers(center=True), two_layers().state_dict(), "mean' is not in the checkpoint")

    def test_R_that_is_not_finite(self) -> None:
        checkpoint = everything(two_layers())
        checkpoint["2.weight_decorr.V"][0, 0, 0] = float("nan")
        checkpoint["0.weight"] += 1
        self.refused(two_layers(), checkpoint, "layer '2'.*NaN or infinity")


@pytest.mark.parametrize("verb", [decorr_fx.fold, decorr_fx.stats, decorr_fx.step, decorr_fx.paused])
def test_verbs_that_need_a_transformed_model_say_so(verb: object) -> None:
    folded = decorr_fx.fold(two_layers())
    for plain in (nn.Linear(2, 2), folded):
        with pytest.raises(NotTransformedError):
            verb(plain)
    with pytest.raises(ModelError, match=r"expected a torch.nn.Module, got str"):
        verb("resnet18")


@pytest.mark.parametrize(
    "config", [DecorrConfig(center=True), DecorrConfig(rule="dbp", center=True, structure="kronecker")]
)
def test_the_gradient_of_the_decorrelated_weight_and_of_the_shifted_bias(config: DecorrConfig) -> None:
    layer = decorr_fx.transform(nn.Conv1d(4, 4, 3, groups=2).double(), config)
    site = layer.weight_decorr
    with torch.no_grad():
        for buffer in (*site.factors, site.mean):
            buffer += 0.3 * torch.randn_like(buffer)
    W, b = layer.weight.detach().requires_grad_(), layer.bias.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda W, b: site.shift_bias(b, site.decorrelate(W)), (W, b))
    assert torch.autograd.gradgradcheck(lambda W: site.decorrelate(W).pow(3), (W,))
