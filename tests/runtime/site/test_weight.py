"""The weights of a site are found by their places, whatever was put there since."""

import copy

import pytest
import torch
from cases import AttentionBlock
from torch import nn
from torch.nn.utils import parametrizations, prune

import decorr_fx
from decorr_fx import LayerError, Power
from decorr_fx.runtime.site.state import Site, sites_of
from decorr_fx.runtime.site.weight import SiteWeight


def two_layers() -> nn.Module:
    return decorr_fx.transform(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), Power(update_every=1))


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(9, 5)).square().sum().backward()
    optimizer.step()


def weight_of(site: Site) -> SiteWeight:
    (weight,) = site.weights
    return weight


def test_it_is_found_after_a_copy_a_load_a_cast_and_a_replacement() -> None:
    model = two_layers()
    site = model[0].weight_decorr
    assert weight_of(site).parameter() is model[0].weight
    other = copy.deepcopy(model)
    assert weight_of(other[0].weight_decorr).parameter() is other[0].weight is not model[0].weight
    model.load_state_dict({"0.weight": torch.ones(4, 5)}, strict=False, assign=True)
    assert weight_of(site).parameter() is model[0].weight
    assert weight_of(site).parameter()[0, 0] == 1
    model.double()
    assert weight_of(site).parameter().dtype == torch.float64
    model[0].weight = nn.Parameter(torch.zeros(4, 5))
    assert weight_of(site).parameter() is model[0].weight


def test_a_part_of_a_packed_weight_is_a_view_of_its_rows() -> None:
    model = decorr_fx.transform(AttentionBlock(), Power(share_inputs=False))
    parts = [weight_of(site) for site in sites_of(model) if site.weights[0].rows is not None]
    packed = model.attn.in_proj_weight
    assert [part.rows for part in parts] == [(0, 6), (6, 12), (12, 18)]
    for part in parts:
        held, gradient, layout = part.parts(packed.detach(), torch.ones_like(packed))
        assert held.data_ptr() == packed[part.rows[0]].data_ptr() and held.shape == gradient.shape == (6, 6)
        assert layout is part.spec.layout


PRUNED = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "parametrized": lambda layer: parametrizations.weight_norm(layer),
    "normed by a hook": lambda layer: nn.utils.spectral_norm(layer),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("way", "new_optimizer"),
    [
        ("pruned", True),
        ("pruned", False),
        ("parametrized", False),
        ("normed by a hook", True),
        ("normed by a hook", False),
    ],
)
def test_a_weight_that_is_replaced_after_the_transform_is_an_error_at_the_step(way: str, new_optimizer: bool) -> None:
    model = two_layers()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(3):
        one_step(model, optimizer)
    PRUNED[way](model[0])
    if new_optimizer:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    optimizer.zero_grad()
    model(torch.randn(9, 5)).square().sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(LayerError, match="layer '0': its weight was pruned or parametrized after transform"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


def test_what_was_pruned_and_made_permanent_goes_on() -> None:
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    one_step(model, optimizer)
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.remove(model[0], "weight")
    one_step(model, optimizer)
    assert [s.steps for s in decorr_fx.stats(model)] == [2, 2]


def test_a_new_optimizer_of_what_the_weight_is_computed_of_trains_the_plain_layer() -> None:
    model = two_layers()
    one_step(model, torch.optim.SGD(model.parameters(), lr=1e-2))
    parametrizations.weight_norm(model[0])
    one_step(model, torch.optim.SGD(model.parameters(), lr=1e-2))
    assert [s.steps for s in decorr_fx.stats(model)] == [1, 2]
