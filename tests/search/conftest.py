"""Toy spaces for the search's tests."""

from collections.abc import Callable

import pytest
import toy_search

from evopress.units import Budget, Space


@pytest.fixture(scope="session")
def quant_space() -> Callable[..., Space]:
    return toy_search.quant_space


@pytest.fixture(scope="session")
def budget_of() -> Callable[[Space, float], Budget]:
    return toy_search.budget_of


@pytest.fixture(scope="session")
def joint_space() -> Space:
    return toy_search.joint_space()
