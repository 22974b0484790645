"""Baselines by name: which method has which, in what order they come, and what is said of one that cannot be made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from evopress.baselines.baseline import EXPERTS, MODULES, WEIGHTS
from evopress.baselines.named import BASELINES, make_baselines, names_serving
from evopress.errors import EvoPressError
from evopress.settings import BaselinesSettings

GROUP = "evopress.baselines"
GREEDY = """
from evopress.baselines.baseline import Baseline

class Greedy(Baseline):
    def __init__(self, *, steps=1):
        self.steps = steps

    def find(self, problem):
        return {"greedy": (0,) * len(problem.space)}

class Nothing:
    pass
"""


def test_every_name_serves_weights_modules_or_experts() -> None:
    ranked = ["shortgpt", "sliding_window", "weight_subcloning", "shortened_llama", "shortened_llama_kl", "l2", "l2_normalized"]
    allocators = ["first_order", "fisher", "linear_model", "one_at_a_time"]
    assert names_serving(WEIGHTS) == ["uniform", "best_of_random", "dp", "owl", "atp", "alphapruning", *allocators]
    assert names_serving(MODULES) == ["best_of_random", *ranked, "interactions", "exhaustive"]
    assert names_serving(EXPERTS) == ["best_of_random", "exhaustive", "least_routed"]
    assert {*names_serving(WEIGHTS), *names_serving(MODULES), *names_serving(EXPERTS)} == set(BASELINES)


def test_rows_have_an_order_of_their_own_and_rankings_that_of_the_settings() -> None:
    settings = BaselinesSettings(names=["owl", "exhaustive", "l2", "shortgpt", "dp", "uniform"])
    assert list(make_baselines(settings)) == ["uniform", "dp", "l2", "shortgpt", "exhaustive", "owl"]


def test_one_from_outside_comes_last_with_its_options(install: Callable[..., Path]) -> None:
    install("greedy", {"greedy": "greedy:Greedy"}, GREEDY, group=GROUP)
    made = make_baselines(BaselinesSettings(names=["greedy", "owl"], options={"greedy": {"steps": 7}}))
    assert list(made) == ["owl", "greedy"] and vars(made["greedy"]) == {"steps": 7}
    assert names_serving(WEIGHTS)[-1] == names_serving(MODULES)[-1] == "greedy"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("greedly", {}, r"^baselines\.names=greedly is unknown: choose one of uniform, .*, owl, .*, greedy, nothing$"),
        ("greedy", {"size": 1}, r"^the baseline greedy does not accept .*\{'size': 1\} .*: its options are steps=1$"),
        ("dp", {"size": 1}, r"^the baseline dp does not accept .*\{'size': 1\} .*: it has no options$"),
        ("nothing", {}, r"^baselines\.names has 'nothing', which is a Nothing, expected an .*Baseline: leave it out$"),
    ],
)
def test_what_cannot_be_made_is_one_sentence(
    name: str, options: dict[str, int], message: str, install: Callable[..., Path]
) -> None:
    install("greedy", {"greedy": "greedy:Greedy", "nothing": "greedy:Nothing"}, GREEDY, group=GROUP)
    with pytest.raises(EvoPressError, match=message):
        make_baselines(BaselinesSettings(names=[name], options={name: options}))
