"""Which rank reads the rows of which site; no processes."""

from collections import Counter

import pytest
import torchvision
from torch import nn

import decorr_fx
from decorr_fx import Crgd, Dbp, Power, Rule
from decorr_fx.runtime.site.state import Site, sites_of
from decorr_fx.runtime.step.divide import exchanged_bytes, is_divided, owner_ranks, update_flops


def sites(*widths: int, rule: Rule | None = None) -> list[Site]:
    layers = [nn.Linear(width, 4) for width in widths]
    return [site for layer in layers for site in sites_of(decorr_fx.transform(nn.Sequential(layer), rule))]


def loads(found: dict[Site, int]) -> Counter[int]:
    """Return the FLOP of each rank."""
    counts: Counter[int] = Counter()
    for site, rank in found.items():
        counts[rank] += update_flops(site)
    return counts


def test_the_longest_goes_first_to_the_rank_that_has_least_to_do() -> None:
    small, large, middle, other = sites(50, 400, 200, 200)
    assert owner_ranks([small, large, middle, other], 2) == {large: 0, middle: 1, other: 1, small: 0}
    assert owner_ranks([small, large, middle, other], 8) == {large: 0, middle: 1, other: 2, small: 3}
    assert owner_ranks([], 2) == owner_ranks([large], 1) == {}


def test_the_order_of_sites_changes_nothing() -> None:
    model = decorr_fx.transform(nn.Sequential(*(nn.Linear(30, 30) for _ in range(7))))
    found = list(sites_of(model))
    assert owner_ranks(found, 3) == owner_ranks(found[::-1], 3)
    assert sorted(owner_ranks(found, 3).values()) == [0, 0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_ranks_have_as_much_to_do_as_each_other_on_a_resnet50(ranks: int) -> None:
    found = list(sites_of(decorr_fx.transform(torchvision.models.resnet50())))
    counts = loads(owner_ranks(found, ranks))
    assert max(counts.values()) < 1.05 * sum(map(update_flops, found)) / ranks


@pytest.mark.parametrize(
    ("rule", "divided"),
    [
        (Power(), True),
        (Power(rank=96), True),  # of 64 rows one half is sent, and 96 come back: as much as two times 64
        (Power(rank=97), False),
        (Dbp(max_samples=64), False),
        (Crgd(max_samples=64), False),
    ],
)
def test_one_rank_reads_for_all_where_that_sends_no_more(rule: Rule, divided: bool) -> None:
    (site,) = sites(200, rule=rule)
    assert is_divided(site, 2) == divided and not is_divided(site, 1)
    sent, to_all = exchanged_bytes([site], 2), 64 * 201 * 4  # half of each sum is sent twice
    assert sent < to_all if divided else sent == to_all
