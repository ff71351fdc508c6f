import re

import pytest

from decorr_fx import Dbp
from tools.common.rules import RULES, fields_of
from tools.train.rule_options import OPTIONS
from tools.train.settings import parse_settings


@pytest.mark.parametrize("name", RULES)
def test_every_setting_of_a_rule_is_an_option_with_its_default(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_settings(["--rule", name]).rule == RULES[name]()
    assert set(fields_of(name)) <= set(OPTIONS)
    with pytest.raises(SystemExit):
        parse_settings(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for field, default in fields_of(name).items():
        option = field.replace("_", "-")
        if isinstance(default, bool):
            assert default and f"--no-{option} " in printed
        else:
            (told,) = re.findall(rf"--{option} [A-Z{{].*?\(default of (.*?)\)", printed)
            of_rule = [part for part in told.split("; ") if name in part.split(": ")[0].split(" and ")]
            assert [part.split(": ")[1] for part in of_rule] == ["by size" if default is None else str(default)]


def test_the_options_of_a_rule_reach_it() -> None:
    arguments = ["--rule", "dbp", "--kappa", "0.2", "--structure", "block", "--no-share-inputs", "--max-samples", "9"]
    settings = parse_settings([*arguments, "--no-preserve-function"])
    expected = Dbp(kappa=0.2, structure="block", share_inputs=False, max_samples=9, preserve_function=False)
    assert settings.rule == expected
    options = settings.by_option()
    assert (options["rule"], options["kappa"], options["lr"]) == ("dbp", 0.2, 1e-3) and "rank" not in options
