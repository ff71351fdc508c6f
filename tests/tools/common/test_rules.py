import pytest

from decorr_fx import ConfigError, Crgd, Dbp, Power
from tools.common.errors import UsageError
from tools.common.rules import RULES, make_rule, name_of


def test_a_rule_is_made_of_its_name_and_settings() -> None:
    assert make_rule("power", {}) == Power()
    assert make_rule("dbp", {"kappa": 0.2}) == Dbp(kappa=0.2)
    assert [name_of(make_rule(name, {})) for name in RULES] == list(RULES)
    with pytest.raises(ConfigError, match="rank is 0"):
        make_rule("power", {"rank": 0})


def test_a_setting_of_another_rule_is_told() -> None:
    assert Crgd().decor_lr == Dbp().decor_lr
    with pytest.raises(UsageError, match="the rule power has no setting 'decor_lr'; it is one of dbp and crgd"):
        make_rule("power", {"decor_lr": 0.1})
    with pytest.raises(UsageError, match="the rule crgd has no setting 'center'; use max_samples, update_every"):
        make_rule("crgd", {"center": True})
    with pytest.raises(UsageError, match="there is no rule 'dbp-normalized'; use power, dbp, crgd"):
        make_rule("dbp-normalized", {})
