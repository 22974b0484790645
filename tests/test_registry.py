"""Parts by name: our own, those of installed packages, and what is said of names and packages that do not work."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from evopress.errors import EvoPressError
from evopress.registry import Registry

Install = Callable[..., Path]
GROUP = "evopress.tests"


def registry() -> Registry[object]:
    return Registry("toy", {"one": 1, "lazy": "json:dumps"}, group=GROUP)


def test_own_parts_come_by_value_or_by_place() -> None:
    import json

    assert registry().get("one", key="toy.name") == 1
    assert registry().get("lazy", key="toy.name") is json.dumps


def test_an_unknown_name_is_told_with_the_choices(install: Install) -> None:
    install("toys", {"zebra": "toys:part", "ape": "toys:part"}, group=GROUP)
    with pytest.raises(EvoPressError, match=r"^toy\.name=two is unknown: choose one of one, lazy, ape, zebra$"):
        registry().get("two", key="toy.name")


def test_another_package_offers_a_part_that_is_loaded_when_asked_for(install: Install) -> None:
    install("toys", {"two": "toys:part"}, "part = 2", group=GROUP)
    assert registry().names() == ("one", "lazy", "two") == tuple(registry())
    assert "two" in registry() and "three" not in registry()
    assert "toys" not in sys.modules
    assert registry().get("two", key="toy.name") == 2


def test_a_broken_package_is_one_sentence_that_names_it(install: Install) -> None:
    install("toys", {"two": "toys:part", "three": "toys:missing"}, "import no_such_module", group=GROUP)
    with pytest.raises(EvoPressError) as told:
        registry().get("two", key="toy.name")
    assert str(told.value) == (
        "the toy two of package toys 1.0 (toys:part) could not be loaded (ModuleNotFoundError: No module named 'no_such_module'): "
        "repair that package, or choose another toy.name"
    )


def test_a_package_without_the_part_is_told(install: Install) -> None:
    install("toys", {"three": "toys:missing"}, "part = 2", group=GROUP)
    with pytest.raises(EvoPressError, match=r"package toys 1\.0 \(toys:missing\) could not be loaded \(AttributeError: "):
        registry().get("three", key="toy.name")


def test_two_packages_with_one_name_are_refused(install: Install) -> None:
    install("toys", {"two": "toys:part"}, "part = 2", group=GROUP)
    install("games", {"two": "games:part"}, "part = 3", group=GROUP)
    with pytest.raises(EvoPressError, match=r"toy\.name=two is registered by package .* and package .*: uninstall all but one"):
        registry().get("two", key="toy.name")


def test_our_own_part_is_not_replaced(install: Install, caplog: pytest.LogCaptureFixture) -> None:
    install("toys", {"one": "toys:part"}, "part = 2", group=GROUP)
    with caplog.at_level(logging.WARNING):
        assert registry().get("one", key="toy.name") == 1
    assert "toy.name=one: taken from EvoPress, not from package toys 1.0 (toys:part)" in caplog.text
    assert registry().names() == ("one", "lazy")
