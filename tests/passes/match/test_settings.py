"""Which rule a layer gets."""

import pytest
from torch import nn

import decorr_fx
from decorr_fx import ConfigError, Dbp, Power, Rule
from decorr_fx.passes.match.settings import Settings
from decorr_fx.passes.match.source import Unmatched
from decorr_fx.runtime.site.state import sites_of

DEFAULT, ONE, TWO, THREE = (Power(rank=rank) for rank in (9, 1, 2, 3))


def chosen(fqn: str, overrides: dict[str, Rule | None]) -> Rule:
    return Settings(DEFAULT, None, overrides).choose(nn.Linear(2, 2), fqn)


def test_a_name_goes_before_a_pattern_and_then_the_first_one_counts() -> None:
    overrides = {r"blocks\..*": ONE, "blocks.0.fc": TWO, r".*\.fc": THREE}
    assert chosen("blocks.0.fc", overrides) is TWO
    assert chosen("blocks.1.fc", overrides) is ONE
    assert chosen("head.fc", overrides) is THREE
    assert chosen("head", overrides) is DEFAULT


def test_a_pattern_matches_a_whole_name() -> None:
    for key in ("fc", "fc.", ".*fc"):
        assert chosen("fc1.x", {key: ONE}) is DEFAULT
    assert chosen("fc1", {"fc.": ONE}) is ONE


@pytest.mark.parametrize("fqn", ["attn.in_proj_weight[0:6]", "a.0", "layers.(x", ""])
def test_a_name_is_taken_literally(fqn: str) -> None:
    assert chosen(fqn, {fqn: ONE}) is ONE


def test_a_name_with_brackets_may_be_copied_from_the_report() -> None:
    plain = nn.ModuleDict({"attn": nn.MultiheadAttention(6, 2), "fc": nn.Linear(6, 2)})
    names = [site.fqn for site in decorr_fx.report(plain).sites]
    assert "attn.in_proj_weight[0:6]" in names
    model = decorr_fx.transform(plain, overrides={name: None for name in names if "in_proj" in name} | {"fc": ONE})
    assert {site.spec.fqn: site.spec.rule for site in sites_of(model)} == {"attn.out_proj": Power(), "fc": ONE}


def test_a_layer_is_left_alone_by_none_and_by_filter_fn() -> None:
    with pytest.raises(Unmatched, match=r"left alone by overrides\['fc'\]"):
        chosen("fc", {"f.": ONE, "fc": None})
    settings = Settings(DEFAULT, lambda module, fqn: isinstance(module, nn.Conv2d), {"fc": ONE})
    with pytest.raises(Unmatched, match="left alone by filter_fn"):
        settings.choose(nn.Linear(2, 2), "fc")
    assert settings.choose(nn.Conv2d(2, 2, 1), "conv") is DEFAULT


def test_rules_may_be_of_several_kinds() -> None:
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model = decorr_fx.transform(plain, Dbp(structure="full"), overrides={"1": Power(), "2": decorr_fx.Crgd()})
    kinds = [type(site.spec.rule) for site in sites_of(model)]
    assert kinds == [Dbp, Power, decorr_fx.Crgd]


def test_every_key_has_to_name_a_layer() -> None:
    settings = Settings(DEFAULT, None, {"fc": ONE, r"block\..": None})
    settings.check_all_match(["fc", "block.0"])
    with pytest.raises(ConfigError, match=r"'fc' matches no layer.*the layers are block\.0, head"):
        settings.check_all_match(["block.0", "head"])
