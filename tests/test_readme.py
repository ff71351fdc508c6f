"""The README is run as it stands."""

import dataclasses
import json
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import decorr_fx
from decorr_fx.passes.capture import adapters
from tools.bench.tables import costs_table
from tools.common.results import Results
from tools.prune.tables import accuracy_table, latency_table, short_table
from tools.study.clock import clocks_of
from tools.study.grid import read_study
from tools.study.summary import collect, summarise
from tools.study.tables import goal_table, learning_table
from tools.zoo.tables import coverage_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
QUICKSTART, SETTINGS, MANY_GPUS, FOLD_SHARDED, PRUNE, ADAPTER = SNIPPETS
RULES = {rule.__name__: rule for rule in (decorr_fx.Power, decorr_fx.Dbp, decorr_fx.Crgd)}


def test_the_quickstart_runs_and_is_on_the_first_screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(QUICKSTART, names)
    assert type(names["plain"]) is nn.Sequential
    assert (tmp_path / "model.onnx").is_file()
    assert README[: README.index(QUICKSTART)].count("\n") < 12


def test_the_settings_run_on_a_model_with_such_names() -> None:
    layers = {"stem": nn.Linear(4, 4), "layer4": nn.Sequential(nn.Linear(4, 4)), "head": nn.Linear(4, 2)}
    names = {"decorr_fx": decorr_fx, "model": nn.Sequential(OrderedDict(layers)), "batches": [torch.randn(8, 4)]}
    exec(SETTINGS, names)
    (site,) = decorr_fx.report(names["model"]).sites
    assert site.fqn == "layer4.0"


def test_the_lines_for_many_gpus_run_in_a_process_group(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        names = {"decorr_fx": decorr_fx, "torch": torch, "model": nn.Linear(4, 2)}
        exec(MANY_GPUS, names)
        assert len(decorr_fx.report(names["model"].module).sites) == 1
        sharded = fully_shard(decorr_fx.transform(nn.Linear(4, 2)))
        exec(FOLD_SHARDED, {"decorr_fx": decorr_fx, "model": sharded})
        assert [*sharded.state_dict()] == ["weight", "bias"]
    finally:
        dist.destroy_process_group()


def test_the_lines_for_pruning_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain, x = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 2)), torch.randn(3, 4)
    exec(PRUNE, names := {"decorr_fx": decorr_fx, "plain": plain, "batches": [torch.randn(20, 4)], "x": x})
    assert (tmp_path / "small.onnx").is_file()
    assert names["result"].model[0].out_features == 4


def test_the_adapter_makes_a_site_of_its_layer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("decorr_fx.passes.capture.adapters._ADAPTERS", dict(adapters._ADAPTERS))
    names: dict[str, object] = {"decorr_fx": decorr_fx, "torch": torch}
    exec(ADAPTER, names)
    assert "1 sites" in capsys.readouterr().out
    plain, x = names["Projection"](), torch.randn(5, 20)
    torch.testing.assert_close(decorr_fx.transform(plain)(x), plain(x))


def test_the_table_of_settings_lists_every_field_of_the_rules() -> None:
    table, rules = {}, ["none"]
    for cell, field, cells in re.findall(r"^\| (.*?) ?\| `(\w+)` \| (`[^|]*`) \|", README, flags=re.MULTILINE):
        rules = list(RULES) if cell == "all" else re.findall(r"`(\w+)`", cell) or rules  # an empty cell: as above it
        of_power, *_, of_others = [*(defaults := re.findall(r"`(.*?)`", cells)), *defaults]
        table |= {(rule, field): of_power if rule == "Power" else of_others for rule in rules}
    fields = {(name, f.name): repr(f.default) for name, rule in RULES.items() for f in dataclasses.fields(rule)}
    assert table == fields


def test_the_coverage_table_is_made_of_the_committed_results() -> None:
    assert coverage_table(ROOT / "tools" / "results") in README


def test_the_table_of_costs_is_made_of_the_committed_results() -> None:
    assert costs_table(ROOT / "tools" / "results" / "bench-cpu.json") in README


def test_the_tables_of_learning_are_made_of_the_committed_results() -> None:
    study = read_study(ROOT / "tools" / "studies" / "full.toml")
    lines = Results(ROOT / "tools" / "results" / "study-full.jsonl").lines
    tried, clocks = collect(study.own(lines)), clocks_of(lines, study.methods)
    assert goal_table(tried, clocks) in README
    assert learning_table(summarise(tried), clocks) in (ROOT / "docs" / "learning.md").read_text()


def test_the_tables_of_pruning_are_made_of_the_committed_results() -> None:
    lines = Results(ROOT / "tools" / "results" / "prune.jsonl").lines
    latency = json.loads((ROOT / "tools" / "results" / "prune-latency.json").read_text())
    assert short_table(lines) in README
    assert accuracy_table(lines) in (details := (ROOT / "docs" / "pruning.md").read_text())
    assert latency_table(latency) in details


def test_the_set_up_lines_are_those_that_ci_runs() -> None:
    assert len(re.findall(r'^python -m pip install -e "\.\[(?:demo|test)\]" && python ', README, re.MULTILINE)) == 2


@pytest.mark.parametrize("picture", re.findall(r"!\[.*?\]\((.*?)\)", README))
def test_the_pictures_are_there(picture: str) -> None:
    assert (ROOT / picture).stat().st_size > 10_000
