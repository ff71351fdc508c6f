"""What a person reads of a model: sites with their costs, skipped layers with the reason."""

import pytest
import torch
from cases import GatedMlp, small_cnn
from torch import Tensor, nn

import decorr_fx
from decorr_fx import ConfigError, Dbp, ModelError, Power
from decorr_fx.ops.cost import ASSUMED_ROWS, around_flops, own_flops, used_rank
from decorr_fx.runtime.site.state import sites_of


def by_name(report: decorr_fx.Report) -> dict[str, decorr_fx.SiteRecord]:
    return {site.fqn: site for site in report.sites}


def test_without_inputs_rows_are_assumed_and_said_to_be() -> None:
    report = decorr_fx.report(small_cnn())
    assert not report.counted and {site.rows for site in report.sites} == {ASSUMED_ROWS}
    assert f"{ASSUMED_ROWS} rows a step assumed" in str(report)


def test_with_inputs_the_rows_of_each_layer_are_counted() -> None:
    plain = small_cnn()
    x = torch.randn(5, 3, 8, 8)
    report = decorr_fx.report(plain, example_inputs=x)
    assert {name: site.rows for name, site in by_name(report).items()} == {"0": 320, "3": 320, "4": 80, "8": 5}
    assert "rows as in one forward on example_inputs" in str(report)
    assert decorr_fx.report(decorr_fx.transform(plain), example_inputs=x) == report


@pytest.mark.parametrize("rows", [1, 64, 4096])
def test_the_used_rank_and_the_cost_are_those_of_so_many_rows(rows: int) -> None:
    report = decorr_fx.report(nn.Linear(64, 32), Power(update_every=1000), example_inputs=torch.randn(rows, 64))
    (site,) = report.sites
    assert site.used == used_rank(32, rows, 0.05) == {1: 4, 64: 4, 4096: 32}[rows]
    layout = next(sites_of(decorr_fx.transform(nn.Linear(64, 32)))).spec.layout
    around = around_flops([layout], site.used)
    assert around <= site.flops < 1.3 * around
    assert site.cost == site.flops / own_flops([layout], rows) == pytest.approx(report.cost)
    if site.used > 4:
        assert around / own_flops([layout], rows) <= 0.05


def test_the_used_rank_is_what_training_with_so_many_rows_uses() -> None:
    plain, x = small_cnn(), torch.randn(5, 3, 8, 8)
    planned = {site.fqn: site.used for site in decorr_fx.report(plain, example_inputs=x).sites}
    model = decorr_fx.transform(plain)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()
    assert {site.spec.fqn: site.used for site in sites_of(model)} == planned


def test_bytes_are_those_of_the_state() -> None:
    for rule in (Power(rank=5), Power(gain=0.0), Dbp(), Dbp(structure="kronecker")):
        model = decorr_fx.transform(small_cnn(), rule)
        for site, record in zip(sites_of(model), decorr_fx.report(model).sites, strict=True):
            assert record.bytes == sum(part.numel() * part.element_size() for part in site.state)
            assert record.row_bytes == site.rows.numel() * site.rows.element_size()


def test_layers_that_share_R_count_it_once() -> None:
    records = by_name(decorr_fx.report(GatedMlp(), Power(update_every=1)))
    assert records["up"].shares_with == "gate" and records["up"].bytes == records["up"].row_bytes == 0
    assert records["up"].flops < records["gate"].flops and records["gate"].shares_with == ""
    assert "shares the R of gate" in str(decorr_fx.report(GatedMlp()))


def test_the_line_under_the_table_adds_it_up() -> None:
    report = decorr_fx.report(small_cnn(), overrides={"8": None})
    lines = str(report).splitlines()
    total = next(line for line in lines if line.startswith("3 sites, 1 skipped"))
    assert f"{100 * report.cost:.1f} % more FLOP" in total
    assert any("left alone by overrides['8']" in line for line in lines)


def test_a_model_that_is_transformed_has_its_own_settings() -> None:
    model = decorr_fx.transform(small_cnn())
    with pytest.raises(ConfigError, match="is transformed already"):
        decorr_fx.report(model, Power(rank=2))
    assert decorr_fx.report(torch.nn.parallel.DataParallel(nn.Linear(2, 2)).module).sites[0].fqn == ""


def test_inputs_that_the_model_does_not_take_are_an_error() -> None:
    with pytest.raises(ModelError):
        decorr_fx.report(small_cnn(), example_inputs=torch.randn(5, 4, 8, 8))


def test_counting_leaves_the_model_as_it_is() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(6, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.layer(x))

    for model in (Counts(), decorr_fx.transform(Counts())):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        state = torch.get_rng_state()
        decorr_fx.report(model, example_inputs=torch.randn(5, 6, generator=torch.Generator().manual_seed(1)))
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert all(site.seen == 0 for site in sites_of(model))
