"""A site: what it records, when its R moves, and that nothing of it is lost, cast or waited for."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from factors import is_identity
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import decorr_fx
from decorr_fx import ConfigError, Crgd, Dbp, ModelError, NotTransformedError, Power, Rule
from decorr_fx.runtime.site.state import Site, sites_of

POWER = Power(update_every=1)
RULES = [
    POWER,
    Power(update_every=1, gain=0.0),
    Dbp(update_every=1, decor_lr=1e6),
    Crgd(update_every=1, decor_lr=1e6),
]
rules = pytest.mark.parametrize("rule", RULES, ids=["Power", "Power with gain", "Dbp", "Crgd"])


def two_layers(rule: Rule = POWER) -> nn.Module:
    return decorr_fx.transform(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), rule)


def one_step(model: nn.Module, x: Tensor, lr: float = 0.0) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    model(x).square().sum().backward()
    optimizer.step()
    model.zero_grad()


def everything(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


@pytest.mark.parametrize("max_samples", [256, 4], ids=["more rows than features", "fewer"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_rows_that_are_not_finite_are_refused_and_counted(value: float, max_samples: int) -> None:
    model = two_layers(Power(update_every=1, max_samples=max_samples))
    x = torch.randn(9, 5)
    x[:, 2] = value
    before = everything(model)
    model(x)
    with decorr_fx.stepping(model):
        pass
    stats = decorr_fx.stats(model)
    assert (stats[0].steps, stats[0].refused) == (0, 1)
    for key in ("0.weight", "0.weight_decorr.U", "0.weight_decorr.scale", "0.weight_decorr.trace"):
        assert torch.equal(model.state_dict()[key], before[key])
    one_step(model, torch.randn(9, 5))
    assert (decorr_fx.stats(model)[0].steps, decorr_fx.stats(model)[0].refused) == (1, 1)


@pytest.mark.parametrize("max_samples", [256, 3], ids=["more rows than features", "fewer"])
def test_no_row_no_step(max_samples: int) -> None:
    model = two_layers(Power(update_every=1, max_samples=max_samples))
    with decorr_fx.stepping(model):
        pass
    assert [(s.steps, s.refused) for s in decorr_fx.stats(model)] == [(0, 0), (0, 0)]


@rules
@pytest.mark.parametrize("x", [torch.zeros(6, 5), torch.ones(6, 5), torch.full((1, 5), 1e4), 1e-20 * torch.ones(6, 5)])
def test_degenerate_rows_leave_R_finite(rule: Rule, x: Tensor) -> None:
    model = two_layers(rule)
    for _ in range(50):
        one_step(model, x, lr=1e-3)
    assert all(part.isfinite().all() for site in sites_of(model) for part in site.state)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "rule", [Power(update_every=1), Dbp(update_every=1), Crgd(update_every=1, structure="kronecker")]
)
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_a_step_never_waits_for_the_device(rule: Rule, name: str) -> None:
    """A tensor on the meta device has no value: reading one on the host, as a sync does, raises."""
    with torch.device("meta"):
        model = decorr_fx.transform(nn.Conv1d(6, 4, 3), rule)
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(5, 6, 9)).sum().backward()
            optimizer.step()
    assert not model.weight_decorr.is_identity
    with pytest.raises(RuntimeError, match="meta"):
        decorr_fx.stats(model)


def test_a_layer_at_every_other_step_does_not_fall_between_the_moves() -> None:
    model = two_layers(Power(update_every=8))
    for site in sites_of(model):
        site.schedule.restart(64)  # past the first steps, at which R moves more often
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(80):
        one_step(model, torch.randn(9, 5))
        optimizer.step()
    assert decorr_fx.stats(model)[0].steps == pytest.approx(80 / 8, rel=0.1)


def test_rows_are_recorded_only_where_R_moves_at_the_coming_step() -> None:
    model = two_layers(Power(update_every=3))
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.0), []
    for _ in range(4):
        model(torch.randn(9, 5))
        seen.append(int(model[0].weight_decorr.seen))
        optimizer.step()
    assert seen == [9, 9, 9, 0]


def test_frozen_layers_record_nothing_and_forget_their_rows() -> None:
    model = two_layers()
    model(torch.randn(9, 5))
    model[0].requires_grad_(False)
    one_step(model, torch.randn(9, 5))
    assert model[0].weight_decorr.seen == 0 and not model[0].weight_decorr.due
    model(torch.randn(9, 5))
    assert [int(site.seen) for site in sites_of(model)] == [0, 9]


def test_a_frozen_model_moves_nothing_however_often_it_is_called() -> None:
    model = two_layers().requires_grad_(False)
    x = torch.randn(9, 5, requires_grad=True)
    model(x).sum().backward()
    assert all(site.seen == 0 for site in sites_of(model))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_forwards_without_gradients_are_not_recorded(mode: Callable[[], object]) -> None:
    model = two_layers()
    x, noise = torch.randn(9, 5), 1e4 * torch.randn(9, 5)
    for _ in range(5):
        loss = model(x).square().sum()
        with mode():
            model(noise)
        loss.backward()
        with decorr_fx.stepping(model):
            pass
        model.zero_grad()
    assert decorr_fx.stats(model)[0].steps == 5
    mean_square = x.square().sum(1).mean()
    torch.testing.assert_close(model[0].weight_decorr.trace[0], mean_square)


def test_nested_and_sparse_inputs_are_not_recorded() -> None:
    layer = decorr_fx.transform(nn.Linear(5, 4))
    layer(torch.randn(9, 5).to_sparse()).sum().backward()
    assert layer.weight_decorr.seen == 0


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_records_each_call_once(use_reentrant: bool) -> None:
    layer = decorr_fx.transform(nn.Linear(5, 5))
    x = torch.randn(9, 5, requires_grad=True)

    def twice(x: Tensor) -> Tensor:
        return layer(layer(x).tanh())

    for _ in range(2):
        checkpoint(twice, x, use_reentrant=use_reentrant).sum().backward()
    site = layer.weight_decorr
    assert site.seen == site.rows_of_step() == 36


def test_paused_keeps_R_and_drops_the_rows() -> None:
    model = two_layers()
    one_step(model, torch.randn(9, 5))
    before = everything(model)
    with decorr_fx.paused(model):
        one_step(model, torch.randn(9, 5))
        model(torch.randn(9, 5))
    with decorr_fx.stepping(model):
        pass
    for key, value in model.state_dict().items():
        assert "extra" in key or torch.equal(value, before[key]), key
    one_step(model, torch.randn(9, 5))
    assert decorr_fx.stats(model)[0].steps == 2
    with pytest.raises(RuntimeError, match="inside"), decorr_fx.paused(model):
        raise RuntimeError("inside")
    assert not any(site.paused for site in sites_of(model))


def test_steps_go_through_R_as_it_is_while_it_is_paused() -> None:
    model = two_layers().double()
    one_step(model, torch.randn(9, 5, dtype=torch.float64))
    R, gain = decorr_fx.matrices(model)["0"][0], model[0].weight_decorr.gain
    with decorr_fx.paused(model):
        model(torch.randn(9, 5, dtype=torch.float64)).square().sum().backward()
        expected = model[0].weight.detach() - 0.1 * model[0].weight.grad @ R.T @ R / gain
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    torch.testing.assert_close(model[0].weight.detach(), expected)


def test_a_copy_made_while_paused_is_not_paused() -> None:
    model = two_layers()
    with decorr_fx.paused(model):
        other = copy.deepcopy(model)
    one_step(other, torch.randn(9, 5))
    assert decorr_fx.stats(other)[0].steps == 1


def test_decor_lr_may_depend_on_the_step() -> None:
    asked: list[int] = []

    def schedule(step: int) -> float:
        asked.append(step)
        return 0.1 if step == 4 else 0.0

    model = two_layers(Dbp(decor_lr=schedule, update_every=2))
    x, still = torch.randn(9, 5), []
    for _ in range(6):
        one_step(model, x)
        still.append(torch.equal(model[0].weight_decorr.R[0], torch.eye(5)))
    assert still == [True, True, True, True, False, False]
    assert set(asked) <= {0, 1, 2, 3, 4, 5} and 4 in asked


def test_a_schedule_that_returns_nonsense_is_an_error() -> None:
    model = two_layers(Dbp(decor_lr=lambda step: -1.0))
    with pytest.raises(ConfigError, match=r"decor_lr\(0\) returned -1.0"):
        one_step(model, torch.randn(9, 5))


@pytest.mark.parametrize(("rows", "used"), [(1, 4), (40, 4), (300, 8), (4096, 32)])
def test_the_used_rank_falls_with_the_rows_of_a_step_and_shapes_stay(rows: int, used: int) -> None:
    layer = decorr_fx.transform(nn.Linear(48, 8), Power(update_every=1))
    site, shapes = layer.weight_decorr, {key: value.shape for key, value in layer.state_dict().items()}
    one_step(layer, torch.randn(rows, 48))
    assert site.used == used
    assert site.matrix().U.shape == (1, used, 48)
    assert {key: value.shape for key, value in layer.state_dict().items()} == shapes


def test_the_rows_of_a_step_are_those_of_all_its_micro_batches() -> None:
    layer = decorr_fx.transform(nn.Linear(48, 8), Power(update_every=1))
    for _ in range(10):
        layer(torch.randn(100, 48)).sum().backward()
    with decorr_fx.stepping(layer):
        pass
    assert layer.weight_decorr.used == 32


def test_a_cast_reaches_no_part_of_R() -> None:
    model = two_layers()
    one_step(model, torch.randn(9, 5))
    before = everything(model)
    for cast in (torch.bfloat16, torch.float16, torch.float32):
        model.to(cast)
    for key, value in model.state_dict().items():
        assert "decorr" not in key or (value.dtype == before[key].dtype and torch.equal(value, before[key])), key
    assert model.double()[0].weight_decorr.U.dtype == torch.float64


def test_half_precision_autocast_keeps_statistics_in_float32() -> None:
    model = two_layers()
    x = torch.randn(9, 5)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
        out.float().square().sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.0).step()
        model(x)
    assert out.dtype is torch.bfloat16 and decorr_fx.stats(model)[0].steps == 1
    assert model[0].weight_decorr.U.dtype is torch.float32
    assert torch.equal(model[0].weight_decorr.rows[:9].sort(0).values, x.sort(0).values)


def test_a_step_under_autocast_is_made_in_full_precision() -> None:
    x, states = torch.randn(30, 5), []
    for autocast in (False, True):
        torch.manual_seed(0)
        model = two_layers()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                optimizer.step()
        states.append(model.state_dict())
    assert all(torch.equal(value, states[0][key]) for key, value in states[1].items())


def test_a_forward_on_the_meta_device() -> None:
    model = decorr_fx.transform(nn.Linear(5, 4)).to("meta")
    assert model(torch.randn(3, 5, device="meta")).shape == (3, 4)


def test_from_the_meta_device_R_is_the_identity() -> None:
    with torch.device("meta"):
        model = two_layers()
    garbage = [torch.full((4096,), 1e30) for _ in range(64)]  # memory that was used before
    del garbage
    model.to_empty(device="cpu")
    assert all(is_identity(site) and site.steps == site.refused == site.seen == 0 for site in sites_of(model))
    for layer in (model[0], model[2]):
        layer.reset_parameters()
    one_step(model, torch.randn(9, 5))
    assert [s.steps for s in decorr_fx.stats(model)] == [1, 1]


def test_to_empty_of_a_trained_model_is_a_start_from_the_identity_only_from_the_meta_device() -> None:
    model = two_layers()
    one_step(model, torch.randn(9, 5))
    before = everything(model)
    model.to("cpu")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_parameters_that_are_reset_are_fresh_ones() -> None:
    model = two_layers()
    for _ in range(5):
        one_step(model, 3 * torch.randn(30, 5), lr=0.1)
    torch.manual_seed(1)
    model[0].reset_parameters()
    torch.manual_seed(1)
    fresh = nn.Linear(5, 4)
    assert type(model[0]) is nn.Linear
    assert torch.equal(decorr_fx.fold(model)[0].weight, fresh.weight)
    known = torch.randn(4, 5)
    model[0].weight.data.copy_(known)
    assert torch.equal(decorr_fx.fold(model)[0].weight, known)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Tensor]) -> None:
    for x in batches:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def by_state_dict(model: nn.Module) -> nn.Module:
    other = two_layers(next(sites_of(model)).spec.rule)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    return other


RESUMES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deep copy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "state_dict": by_state_dict,
}


@pytest.mark.parametrize("way", RESUMES)
@pytest.mark.parametrize("rule", [Power(update_every=3), Power(gain=0.5), Dbp(update_every=3),
                                  Crgd(update_every=3)], ids=["Power", "with gain", "Dbp", "Crgd"])  # fmt: skip
def test_training_goes_on_bit_for_bit(way: str, rule: Rule) -> None:
    model = two_layers(rule)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    batches = [torch.randn(30, 5) for _ in range(20)]
    train(model, optimizer, batches[:8])
    other = RESUMES[way](model)
    again = torch.optim.Adam(other.parameters(), lr=0.01)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, batches[8:])
    train(other, again, batches[8:])
    assert decorr_fx.stats(model) == decorr_fx.stats(other)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("update_every", [1, 8])
def test_recorded_rows_are_not_saved(update_every: int) -> None:
    model = two_layers(Power(update_every=update_every))
    model(torch.randn(3, 5))
    assert not [key for key in model.state_dict() if "rows" in key or "seen" in key]
    model.load_state_dict(model.state_dict())
    assert model[0].weight_decorr.seen == 0


def test_an_optimizer_of_another_model_is_not_disturbed() -> None:
    model = two_layers()
    del model[0].weight
    one_step(two_layers(), torch.randn(9, 5))


def test_a_printed_model_names_its_sites() -> None:
    model = decorr_fx.transform(nn.Sequential(nn.Conv2d(3, 4, 3, groups=1), nn.Flatten(), nn.Linear(4, 2)), Dbp())
    assert "Site(conv2d, d=27, full, Dbp)" in str(model)


@pytest.mark.parametrize("verb", [decorr_fx.fold, decorr_fx.stats, decorr_fx.stepping, decorr_fx.paused,
                                  decorr_fx.matrices, decorr_fx.state_keys])  # fmt: skip
def test_verbs_that_need_a_transformed_model_say_so(verb: Callable[[object], object]) -> None:
    folded = decorr_fx.fold(two_layers())
    for plain in (nn.Linear(2, 2), folded):
        with pytest.raises(NotTransformedError):
            verb(plain)
    with pytest.raises(ModelError, match=r"expected a torch.nn.Module, got str"):
        verb("resnet18")


@rules
def test_the_dense_matrix_is_what_weights_are_multiplied_with(rule: Rule) -> None:
    layer = decorr_fx.transform(nn.Conv1d(4, 6, 3, groups=2).double(), rule)
    one_step(layer, torch.randn(8, 4, 9, dtype=torch.float64))
    site: Site = next(sites_of(layer))
    R = site.dense()
    assert R.shape == (2, 6, 6) and not torch.equal(R[0], torch.eye(6))
    layer(torch.randn(8, 4, 9, dtype=torch.float64)).square().sum().backward()
    weight, gradient = layer.weight.detach().clone(), layer.weight.grad.clone()
    gain = site.gain if isinstance(rule, Power) else torch.ones(2)
    with decorr_fx.paused(layer):
        torch.optim.SGD(layer.parameters(), lr=0.1).step()
    for group, rows in enumerate(gradient.flatten(1).chunk(2)):
        expected = weight.flatten(1).chunk(2)[group] - 0.1 * rows @ R[group].T @ R[group] / gain[group]
        torch.testing.assert_close(layer.weight.detach().flatten(1).chunk(2)[group], expected)
