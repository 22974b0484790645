"""The list of tests that take long names tests that are there."""

import re
from pathlib import Path

import yaml

HERE = Path(__file__).parent


def test_every_slow_test_is_there() -> None:
    for file, names in yaml.safe_load((HERE / "slow_tests.yaml").read_text(encoding="utf-8")).items():
        there = set(re.findall(r"^def (test_\w+)", (HERE / file).read_text(encoding="utf-8"), re.MULTILINE))
        assert not set(names) - there, file
