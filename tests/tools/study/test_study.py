import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from decorr_fx import Dbp, Power
from tools.common.errors import UsageError
from tools.study.__main__ import main
from tools.study.grid import Run, read_study, rule_of
from tools.study.run import perform
from tools.study.summary import collect, summarise
from tools.study.text import CONTEXT, Text
from tools.study.workloads import WORKLOADS
from tools.train import sources

ROOT = Path(__file__).parents[3]
GRID = """
tune = [0]
seeds = [0, 1]
evaluations = 4
[methods.power]
rule = "power"
[[grid]]
workloads = ["digits"]
optimizers = ["sgd"]
methods = ["plain", "power"]
lr = [0.01, 0.1]
"""


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(GRID)
    return path


def test_a_study_tunes_on_one_seed_runs_the_others_and_goes_on_where_it_was(
    grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(grid), "--out", str(tmp_path), "--jobs", "2"]) == 0
    table = capsys.readouterr().out
    assert table.count("| digits") == 2 and "n=2" in table
    path = tmp_path / "study-small.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    runs = [Run(**line["run"]) for line in lines if "run" in line]
    assert [run.seed for run in runs].count(0) == 4
    assert 2 <= [run.seed for run in runs].count(1) <= 3  # the best rate of each, and the plain one's
    assert all(len(line["history"]) == 4 and line["threads"] == 1 for line in lines if "run" in line)
    timed = [timed for line in lines for timed in line.get("timed", ())]
    assert [(one["optimizer"], one["method"]) for one in timed] == [("sgd", "plain"), ("sgd", "power")]
    assert all(sorted(one["seconds"]) == one["seconds"] for one in timed)
    assert (tmp_path / "study-small.png").stat().st_size > 5000

    whole = path.read_text()
    path.write_text(whole.splitlines(keepends=True)[0] + whole.splitlines()[1][:50])  # interrupted while writing
    kept = path.read_text().splitlines()[0]
    assert main([str(grid), "--out", str(tmp_path), "--jobs", "2"]) == 0
    again = path.read_text().splitlines()
    assert again[0] == kept and len(again) == len(lines)

    assert main([str(grid), "--out", str(tmp_path), "--table"]) == 0
    assert path.read_text().splitlines() == again


def test_runs_end_with_a_study_that_is_killed(grid: Path, tmp_path: Path) -> None:
    grid.write_text(GRID.replace("digits", "text"))  # whose runs take a minute
    study = psutil.Popen([sys.executable, "-m", "tools.study", grid, "--out", tmp_path, "--jobs", "2"], cwd=ROOT)
    while len([child for child in study.children() if "spawn_main" in " ".join(child.cmdline())]) < 2:
        assert study.poll() is None
        time.sleep(0.1)
    runs = study.children()
    time.sleep(5)  # until they train
    study.kill()
    study.wait()
    deadline = time.monotonic() + 20
    while not all(has_ended(run) for run in runs):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE  # that nobody has asked after yet
    except psutil.NoSuchProcess:
        return True


def test_a_run_that_diverges_is_recorded_and_chosen_by_nobody() -> None:
    line = perform(Run("digits", "sgd", "plain", 1e6, 0, 4))
    assert line["diverged"] and line["test"] is None
    good = perform(Run("digits", "sgd", "plain", 0.1, 0, 4))
    (summary,) = summarise(collect([line, good]))
    assert summary.best.lr == 0.1 and summary.rates == 2


def test_a_run_depends_on_what_names_it_alone() -> None:
    run = Run("digits", "adam", "power", 1e-3, 3, 2, {"rule": "power", "update_every": 2})
    torch.manual_seed(5)
    first = perform(run)
    second = perform(run)
    assert first["history"] == second["history"] and first["test"] == second["test"]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("digits", "digitz", "no workload 'digitz'"),
        ('"sgd"', '"sgdd"', "no optimizer 'sgdd'"),
        ('"plain", "power"', '"plain", "powder"', "no method 'powder'"),
        ('rule = "power"', 'rule = "powder"', "method 'power': there is no rule 'powder'; use power, dbp, crgd"),
        ('rule = "power"', "rule = 3", "method 'power': there is no rule 3"),
        ('rule = "power"', "rules = 1", "method 'power': the rule power has no setting 'rules'; use max_samples, "),
        ('rule = "power"', "center = true", "method 'power': the rule power has no setting 'center'"),
        ('rule = "power"', "kappa = 0.1", "method 'power': the rule power has no setting 'kappa'; it is one of dbp"),
        ('rule = "power"', "rank = 0", "method 'power': rank is 0"),
        ("[0.01, 0.1]", "[0.01, -0.1]", "lr has -0.1"),
        ("[0.01, 0.1]", "[]", "lr is"),
        ("[0, 1]", "[0.5]", "seeds has 0.5"),
        ("seeds = [0, 1]", "seeds = []", "seeds is"),
        ("evaluations = 4", "evaluations = 3", "evaluations is 3"),
        ("[methods.power]", "[methods.plain]", "'plain' is backpropagation"),
        ('rule = "power"', 'rule = "dbp"\ncalibrate = 2', "calibrate is for the rule power"),
        (
            'rule = "power"',
            "preserve_function = false\ncalibrate = 2",
            "calibrate is for the rule power that preserves",
        ),
        ('rule = "power"', "calibrate = 0", "calibrate is 0"),
        ('rule = "power"', "calibrate = 1.5", "calibrate has 1.5"),
        ("tune = [0]", "tunes = [0]", "no key 'tunes'"),
        ("tune = [0]", "tune = [0", "cannot be read"),
    ],
)
def test_a_wrong_file_is_told_in_a_line(grid: Path, old: str, new: str, told: str) -> None:
    grid.write_text(GRID.replace(old, new))
    with pytest.raises(UsageError, match=told):
        read_study(grid)


def test_files_that_are_missing_or_damaged_end_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.toml")]) == 2
    assert "none.toml cannot be read" in capsys.readouterr().err


def test_a_table_of_nothing_is_told_in_a_line(grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(grid), "--table", "--out", str(tmp_path)]) == 2
    assert "run the study without --table first" in capsys.readouterr().err


def test_a_study_is_not_run_on_other_images(
    fashion: Path, grid: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sources, "DEBIAN_FASHION_MNIST", fashion)
    grid.write_text(GRID.replace("digits", "cnn"))
    assert main([str(grid), "--out", str(grid.parent)]) == 2
    assert "the train images are not Fashion-MNIST as published" in capsys.readouterr().err
    assert not (grid.parent / "study-small.jsonl").exists()


def test_the_committed_studies_can_be_read_and_are_of_the_defaults() -> None:
    for path in (ROOT / "tools" / "studies").glob("*.toml"):
        study = read_study(path)
        assert all(study.tuning_runs(race) for race in study.races)
        (default,) = (of for name, of in study.methods.items() if name in ("power", "default"))
        assert rule_of(default) == Power()
        assert rule_of(study.methods.get("dbp", {"rule": "dbp"})) == Dbp()


def test_a_method_is_of_the_rule_power_where_it_names_none(grid: Path) -> None:
    grid.write_text(GRID.replace('rule = "power"', "rank = 8\ncalibrate = 2"))
    assert rule_of(read_study(grid).methods["power"]) == Power(rank=8)


def test_runs_with_other_settings_are_not_part_of_a_study(grid: Path) -> None:
    study = read_study(grid)
    (race,) = study.races
    run = study.run(race, "power", 0.1, 1)
    others = [replace(run, lr=0.2), replace(run, config={"rule": "dbp"}), replace(run, seed=7)]
    lines = [{"run": one.as_json()} for one in [run, *others]]
    assert study.own([*lines, {"timing": "digits"}]) == lines[:1]


def test_blocks_on_the_same_are_one_race(grid: Path) -> None:
    block = GRID[GRID.index("[[grid]]") :].replace('"sgd"', '"adam", "sgd"').replace("[0.01, 0.1]", "[0.1, 1e-1, 1.0]")
    grid.write_text(GRID + block)
    adam, sgd = read_study(grid).races
    assert adam.optimizer == "adam" and sgd.rates == dict.fromkeys(["plain", "power"], (0.01, 0.1, 1.0))


def test_the_text_is_split_without_overlap_and_asks_for_the_next_character() -> None:
    text = Text()
    x, y = next(text.training_batches(3, 0, torch.device("cpu")))
    assert x.shape == y.shape == (3, CONTEXT) and torch.equal(x[:, 1:], y[:, :-1])
    sizes = {name: len(windows) for name, windows in text.splits.items()}
    assert sizes["validation"] == sizes["test"] > 500 and sizes["train"] > 7 * sizes["test"]
    logits = WORKLOADS["text"].build()(x)
    assert logits.shape == (3, len(text.characters), CONTEXT)


def test_a_character_model_does_not_look_ahead() -> None:
    model, (x, _) = WORKLOADS["text"].build().eval(), next(Text().training_batches(1, 0, torch.device("cpu")))
    other = x.clone()
    other[:, CONTEXT // 2 :] = 0
    torch.testing.assert_close(model(x)[..., : CONTEXT // 2], model(other)[..., : CONTEXT // 2])


def test_every_workload_builds_and_takes_its_data() -> None:
    for name in ("cnn-bn", "mlp", "vit", "resnet"):
        workload = WORKLOADS[name]
        assert workload.build().eval()(torch.randn(2, 1, 28, 28)).shape == (2, 10)


def test_a_run_may_be_calibrated_first() -> None:
    run = Run("digits", "adam", "power", 1e-3, 3, 2, {"rule": "power"})
    first = perform(run)
    second = perform(replace(run, config={"rule": "power", "calibrate": 4}))
    assert first["history"] != second["history"]


def test_soap_learns_with_decorrelation() -> None:
    line = perform(Run("digits", "soap", "power", 3e-3, 0, 4, {"rule": "power"}))
    assert line["diverged"] is None and line["test"][1] > 0.85
