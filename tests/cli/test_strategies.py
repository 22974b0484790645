"""Search strategies from the command line: the paper's by default, one that another package offers, and names that are wrong."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import evopress.stages.search as program_search
from evopress.errors import EvoPressError

OUTSIDE = Path(__file__).parent.parent / "reference" / "random_search.py"
WRONG = """
from dataclasses import dataclass, field
class Plain:
    name = "plain"
@dataclass
class Lacking:
    name: str
@dataclass
class Strange:
    name: str = "strange"
    steps: object = field(default_factory=object)
"""
STAGES = "stages=[database,search]"


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a package that offers a strategy, and others that cannot be options."""
    site = tmp_path / "site"
    info = site / "strategies_of_others-2.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: strategies-of-others\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text(
        "[evopress.strategies]\nrandom = others_random:RandomSearch\nbroken = others_gone:Gone\n"
        "plain = others_wrong:Plain\nlacking = others_wrong:Lacking\nstrange = others_wrong:Strange\n"
    )
    (site / "others_wrong.py").write_text(WRONG)
    shutil.copyfile(OUTSIDE, site / "others_random.py")
    monkeypatch.syspath_prepend(site)
    yield
    for module in ("others_random", "others_wrong"):
        sys.modules.pop(module, None)


def test_a_strategy_of_another_package_searches_is_resumed_and_reported(
    tiny: Callable[..., Any], offered: None, tmp_path: Path
) -> None:
    command = (
        "search/strategy=random",
        "search.strategy.candidates=3",
        "evaluation.every=1",
        "stages=[database,search,evaluate,report]",
    )
    outcome = tiny(*command)
    assert outcome.code == 0, outcome.text
    folder = tmp_path / "run"
    assert "search: 3 times 3 random mixes" in outcome.text
    assert [record["generation"] for record in records(folder)] == [0, 1, 2, 3]
    assert read(folder / "state.json")["strategy"] == "random"
    assert read(folder / "result.json")["search"]["generations"] == 3
    assert (folder / "figures" / "convergence.png").exists() and (folder / "report.html").exists()

    cut = tmp_path / "cut"
    assert tiny(*command, "search.strategy.generations=1", folder=cut).code == 0
    outcome = tiny(*command, folder=cut)
    assert outcome.code == 0, outcome.text
    assert "resuming at generation 2 of 3" in outcome.text
    assert (cut / "genome.json").read_bytes() == (folder / "genome.json").read_bytes()

    refused = tiny(STAGES, folder=cut)
    assert refused.code == 1 and "search.strategy 'random' there, 'evolution' here" in refused.errors[0], refused.text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["search/strategy=annealing"], "search/strategy=annealing is not there: choose one of broken, evolution"),
        (["search.strategy.name=annealing"], "search.strategy.name=annealing is unknown: choose one of evolution"),
        (["search.strategy.name=random"], "choose it with search/strategy=random"),
        (
            ["search/strategy=broken"],
            "the search strategy broken of package strategies-of-others 2.0 (others_gone:Gone) could not be",
        ),
        (
            ["search/strategy=plain"],
            "the search strategy plain of package strategies-of-others 2.0 (others_wrong:Plain) is no dataclass, expected one",
        ),
        (["search/strategy=lacking"], "(others_wrong:Lacking) cannot be an option (TypeError: "),
        (["search/strategy=strange"], "(others_wrong:Strange) cannot be an option (ValidationError: "),
        (["search/strategy=random", "search.strategy.token=3"], "token"),
        (["search/strategy=random", "search.strategy.tokens=3000"], "search.strategy.tokens asks for a minibatch of 3000 tokens"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    arguments: list[str], sentence: str, tiny: Callable[..., Any], offered: None, tmp_path: Path
) -> None:
    outcome = tiny(STAGES, *arguments)
    assert outcome.code == 1 and "Traceback" not in outcome.text, outcome.text
    (error,) = outcome.errors
    assert sentence in error
    assert not (tmp_path / "run" / "state.json").exists()


def test_a_run_of_an_earlier_version_goes_on(tiny: Callable[..., Any], evopress: Callable[..., Any], tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert tiny(STAGES, folder=whole).code == 0
    outcome = tiny(STAGES, "search.generations=1")
    assert outcome.code == 0, outcome.text
    config = yaml.safe_load((folder / ".hydra" / "config.yaml").read_text())
    assert config["search"].pop("strategy") == {"name": "evolution"}
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config))
    assert "strategy" not in read(folder / "state.json")
    assert evopress(f"resume={folder}").code == 0
    assert len(records(folder)) == 2, "it was finished and stays so"
    outcome = evopress(f"resume={folder}", "search.generations=3")
    assert outcome.code == 0, outcome.text
    assert (folder / "genome.json").read_bytes() == (whole / "genome.json").read_bytes()


@pytest.mark.parametrize("method", [("+method=quant", "bits=2.5"), ("+method=sparsity", "sparsity=0.7")], ids=["quant", "sparsity"])
def test_guided_searches_and_a_killed_run_ends_with_the_same_genome(
    method: tuple[str, ...], evopress: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (*method, "+debug=tiny", STAGES, "search/strategy=guided", "search.strategy.generations_after=2")

    def run(folder: Path, *more: str) -> Any:
        return evopress(*command, f"hydra.run.dir={folder}", *more)

    whole = run(tmp_path / "whole")
    assert whole.code == 0, whole.text
    assert "search: at most 5 guided rounds, then 2 generations, λ = 4" in whole.text
    assert re.search(r"search +at most 7 of 7 generations", whole.text)
    made = records(tmp_path / "whole")
    rounds = [record for record in made if "details" in record]
    assert [record["generation"] for record in made] == list(range(len(made))) and len(made) == 1 + len(rounds) + 2
    assert rounds[0]["accepted"] and rounds[0]["tokens"] == 3 * 512 + 128 * rounds[0]["stages"][0]["num_candidates"]
    assert all(record["held_out"] for record in rounds), "measured after every round"
    assert rounds[0]["held_out"]["kl"] < made[0]["held_out"]["kl"]
    budget = read(tmp_path / "whole" / "genome.json")["budget"]
    assert all(record["cost"] <= budget for record in made)

    stop = [2]
    finish = program_search.write_json

    def killed(path: Path, value: Any, **how: Any) -> None:
        finish(path, value, **how)
        if path.name == "state.json":
            stop[0] -= 1
            if not stop[0]:
                raise EvoPressError("cut off")

    with monkeypatch.context() as patch:
        patch.setattr(program_search, "write_json", killed)
        assert run(tmp_path / "cut").code == 1
    assert len(records(tmp_path / "cut")) == 2
    again = evopress(f"resume={tmp_path / 'cut'}")
    assert again.code == 0, again.text
    assert "resuming at generation 2 of 7" in again.text
    assert (tmp_path / "cut" / "genome.json").read_bytes() == (tmp_path / "whole" / "genome.json").read_bytes()
    for mine, theirs in zip(records(tmp_path / "cut"), made, strict=True):
        assert {**mine, "seconds": 0} == {**theirs, "seconds": 0}


def test_measured_neighbours_are_among_the_tokens_that_are_said_first(evopress: Callable[..., Any]) -> None:
    own = ("search/strategy=guided", "search.strategy.delta_rounds=1")
    outcome = evopress("+method=quant", "bits=3.5", "+debug=tiny", STAGES, *own)
    assert outcome.code == 0, outcome.text
    before = re.search(r"the search evaluates at most ([\d,]+) candidate tokens", outcome.text)
    then = re.search(r"at most ([\d,]+) candidate tokens$", outcome.text, re.MULTILINE)
    assert before and then and before[1] == then[1] and before.end() < outcome.text.index("what this run will take")


@pytest.mark.parametrize("method", [("+method=drop", "sparsity=0.5"), ("+method=joint", "size=2.5bpw")], ids=["drop", "joint"])
def test_guided_drops_modules(method: tuple[str, ...], evopress: Callable[..., Any], tmp_path: Path) -> None:
    outcome = evopress(*method, "+debug=tiny", STAGES, "search/strategy=guided", f"hydra.run.dir={tmp_path / 'run'}")
    assert outcome.code == 0, outcome.text
    made = records(tmp_path / "run")
    assert made[0]["generation"] == 0 and made[0]["tokens"] == 2 * 5 * 512, "no genome to begin with keeps the budget"
    assert made[1]["details"]["dropping"]
    budget = read(tmp_path / "run" / "genome.json")["budget"]
    assert all(record["cost"] <= budget for record in made)
    counted = int(re.search(r"at most ([\d,]+) candidate tokens$", outcome.text, re.MULTILINE)[1].replace(",", ""))
    assert made[-1]["tokens"] <= counted


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("+method=quant", "bits=2.5", "fitness.evaluator=plain"),
            "search/strategy=guided needs fitness.evaluator=population, not plain",
        ),
        (("+method=quant", "bits=2.5", "search.strategy.changes=[0]"), "search.strategy.changes=[0] is out of range"),
        (("+method=quant", "bits=2.5", "search.max_level=2"), "knows no such bounds"),
        (("+method=quant", "bits=2.5", "search.strategy.attribution_tokens=4096"), "asks for a minibatch of 4096 tokens"),
        (
            ("+method=quant", "bits=2.5", "data.search_tokens=32", "model.sequence_length=32"),
            "needs at least 2 sequences of search text",
        ),
    ],
)
def test_where_guided_cannot_search_is_one_sentence(
    arguments: tuple[str, ...], sentence: str, evopress: Callable[..., Any], tmp_path: Path
) -> None:
    outcome = evopress(*arguments, "+debug=tiny", "search/strategy=guided", f"hydra.run.dir={tmp_path / 'run'}")
    assert outcome.code == 1 and "Traceback" not in outcome.text, outcome.text
    (error,) = outcome.errors
    assert sentence in error
    assert not (tmp_path / "run" / "state.json").exists()
