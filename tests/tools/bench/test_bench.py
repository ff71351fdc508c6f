import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import decorr_fx
from decorr_fx import Dbp
from decorr_fx.ops import reference
from tools.bench.__main__ import main
from tools.bench.cases import SUITES, Bars, Case, sweep
from tools.bench.measure import Contender, Spread, race
from tools.bench.memory import peak_bytes
from tools.bench.methods import DECORRELATED, FIRST, METHODS, prepare, step_kinds
from tools.bench.models import build_model, make_batch
from tools.bench.tables import costs_table
from tools.bench.textbook import EPS, KAPPA, TextbookLayer, textbook

TINY = ["--model", "linears", "--batch", "16", "--seconds", "0.1"]


def test_a_case_is_measured_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--methods", "power", "dbp-kronecker", "textbook", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "linears, 16 x 256, float32, eager, cpu" in printed and "textbook" in printed
    whole = json.loads((tmp_path / "bench-linears.json").read_text())
    assert whole["torch"] == torch.__version__ and whole["threads"] == torch.get_num_threads()
    (case,) = whole["cases"]
    assert [result["method"] for result in case["results"]] == ["plain", "power", "dbp-kronecker", "textbook"]
    for result in case["results"]:
        assert result["steps"] >= 12
        assert sum(result["phases"].values()) == pytest.approx(result["step"]["median"], rel=0.8)
        assert list(result["phases"]) == ["forward", "backward", "optimizer", "decorrelation"]
        assert (result["first_ratio"]["median"] > result["ratio"]["median"]) == (result["method"] in DECORRELATED)
        assert result["step"]["low"] <= result["step"]["median"] <= result["step"]["high"]
    plain, power, *_ = case["results"]
    assert plain["ratio"]["median"] == plain["first_ratio"]["median"] == pytest.approx(1)
    assert plain["phases"]["decorrelation"] < 0.1 * power["phases"]["decorrelation"]
    assert (tmp_path / "bench-linears.png").stat().st_size > 5000
    table = costs_table(tmp_path / "bench-linears.json")
    assert "| linears, 16 x 256" in table and f"| {power['first_ratio']['median']:.2f} " in table


def test_a_case_may_be_measured_for_its_memory_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = Case("linears", batch=2, width=8)
    cases = (timed, replace(timed, timed=False, memory=True, bars=Bars(memory=1.05)))
    monkeypatch.setitem(SUITES, "cpu", cases)
    monkeypatch.setattr("tools.bench.__main__.peak_bytes", lambda case, method: 200 if method == "plain" else 206)
    assert main(["--suite", "cpu", "--seconds", "0.1", "--out", str(tmp_path)]) == 0
    *_, row = costs_table(tmp_path / "bench-cpu.json").splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["linears, 2 x 8, float32, eager, cpu", "-", "-", "-", "", "-", "-", "1.030", "1.05"]


def test_growth_is_drawn_in_one_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fewer(case: Case, over: str) -> list[Case]:
        return sweep(case, over)[:2]

    monkeypatch.setattr("tools.bench.__main__.sweep", fewer)
    assert main([*TINY, "--sweep", "samples", "d", "--out", str(tmp_path)]) == 0
    cases = [case["case"] for case in json.loads((tmp_path / "bench-growth.json").read_text())["cases"]]
    assert [(case["max_samples"], case["width"]) for case in cases] == [(32, 256), (64, 256), (None, 64), (None, 128)]
    assert (tmp_path / "bench-growth.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model", "resnet19"], "resnet19 is neither a torchvision classifier nor a timm model"),
        (["--suite", "gpu", "--sweep", "d"], "not allowed with"),
        (["--methods", "magic"], "invalid choice"),
        (["--batch", "0"], "0 is not at least 1"),
        (["--table", "--suite", "cpu", "--out", "{empty}"], "No such file"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_line(
    arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = [] if "--out" in arguments else ["--out", str(tmp_path)]
    assert main([argument.format(empty=tmp_path) for argument in arguments] + out) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"cases": [{"case": {}, "results": []}]}'])
def test_a_damaged_file_is_said_in_a_line(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bench-cpu.json").write_text(text)
    assert main(["--suite", "cpu", "--table", "--out", str(tmp_path)]) == 2
    assert "bench-cpu.json cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("soap", "shampoo")])
def test_every_method_trains_a_model(method: str) -> None:
    contender = Contender(Case("linears", batch=8, width=16), method)
    before = [p.detach().clone() for p in contender.model.parameters()]
    race([contender], 0.0)
    assert any(not torch.equal(p, old) for p, old in zip(contender.model.parameters(), before, strict=True))
    assert contender.measured == 12
    assert sum(step_kinds(method).shares.values()) == pytest.approx(1)


def test_R_moves_more_often_in_the_first_steps_than_later() -> None:
    model, optimizer = prepare(Case("linears", batch=8, width=16), "power")
    for _ in range(FIRST):
        optimizer.zero_grad()
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
    kinds = step_kinds("power")
    assert kinds.first[True] == decorr_fx.stats(model)[0].steps / FIRST > 3 * kinds.shares[True]


def test_kinds_of_steps_are_those_that_R_takes() -> None:
    contender = Contender(Case("linears", batch=8, width=16), "power")
    contender.train(steps=8)
    assert decorr_fx.stats(contender.model)[0].steps == len(contender.steps[True]) == 2
    assert len(contender.steps[False]) == 6


def test_what_a_step_costs_is_the_mean_over_kinds_of_their_medians() -> None:
    spread = Spread.weighted({True: 0.25, False: 0.75}, {True: [10.0, 11.0, 12.0], False: [1.0, 2.0, 300.0]})
    assert spread.median == pytest.approx(0.25 * 11 + 0.75 * 2)


def test_peak_memory_is_that_of_the_method() -> None:
    small, large = (peak_bytes(Case("linears", batch=8, width=width), "plain") for width in (64, 2048))
    weights = 4 * 3 * 2048**2
    assert 4 * weights < large < 7 * weights  # weights, gradients, two moments, and what a step needs besides
    assert small < 0.2 * large


def test_the_textbook_form_is_that_of_the_equations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.bench.textbook.SAMPLED", 1.0)
    layer = TextbookLayer(nn.Conv2d(2, 3, 3, stride=2, padding=1)).double()
    layer.R += 0.1 * torch.randn_like(layer.R)
    R, x = layer.R.clone(), torch.randn(40, 2, 5, 6, dtype=torch.float64)
    rows = reference.patches(x, layer.layer.weight.shape, 1, False, stride=2, padding=1)
    expected = reference.theta_of(layer.layer.weight.flatten(1), R)
    out = layer.eval()(x)
    torch.testing.assert_close(out.movedim(1, -1).flatten(0, -2), rows @ expected.T + layer.layer.bias)
    layer.train()(x)
    torch.testing.assert_close(layer.R, R - EPS * reference.gradient(rows @ R.T, Dbp(kappa=KAPPA)) @ R)


def test_the_textbook_form_takes_all_of_a_resnet() -> None:
    model = textbook(build_model(Case()))
    assert sum(isinstance(module, TextbookLayer) for module in model.modules()) == 21
    assert model(make_batch(Case(batch=2, size=32))[0]).shape == (2, 100)


def test_suites_name_models_and_methods_that_there_are() -> None:
    for suite in SUITES.values():
        for case in suite:
            assert set(case.methods) <= set(METHODS)
    mlp, gpt2 = (build_model(Case(name)) for name in ("mlp", "gpt2"))
    assert sum(p.numel() for p in mlp.parameters()) == 784 * 512 + 2 * 512**2 + 512 * 10 + 3 * 512 + 10
    assert round(sum(p.numel() for p in gpt2.parameters()), -6) == 124_000_000
    for name, model in (("mlp", mlp), ("gpt2", gpt2)):
        inputs, labels = make_batch(Case(name, batch=2, size=3))
        assert torch.nn.functional.cross_entropy(model(inputs), labels).isfinite()
    prepare(Case("vit_tiny_patch16_224", batch=1, size=224), "power")
