"""The worked examples of docs/extending.md: packages beside EvoPress, used by the program as the guide says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

GUIDE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")


def examples(heading: str) -> dict[str, str]:
    """Return the code blocks below a heading of the guide, by language."""
    section = re.split(r"^#{2,3} ", GUIDE.split(f"# {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    return dict(re.findall(r"^```(\w+)\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL))


def installed(blocks: dict[str, str], install: Callable[..., Path]) -> None:
    """Install the package that a section describes."""
    (group,) = re.findall(r'entry-points\."([\w.]+)"', blocks["toml"])
    points = dict(re.findall(r'^(\w+) = "([\w.:]+)"$', blocks["toml"], flags=re.MULTILINE))
    package = next(iter(points.values())).partition(":")[0]
    install(package, points, blocks["python"], group=group)


@pytest.fixture
def stories(install: Callable[..., Path], tmp_path: Path) -> list[str]:
    """Follow the guide's section on text and return the arguments that use its config."""
    blocks = examples("A text source of your own")
    installed(blocks, install)
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "stories.yaml").write_text(blocks["yaml"])
    (tmp_path / "stories.txt").write_text("".join(f"Once upon a time there were {i} little words. \n" * 3 for i in range(200)))
    arguments = re.findall(r"'(hydra\.searchpath=.*?)' (data=\w+)", blocks["sh"])[0]
    return [arguments[0].replace("/home/me", str(tmp_path)), arguments[1]]


def test_a_text_source_from_outside_is_used_and_resumed(
    stories: list[str], tiny: Callable[..., Any], evopress: Callable[..., Any], tmp_path: Path
) -> None:
    first = tiny(*stories, "stages=[database,baselines]")
    assert first.code == 0, first.text
    resumed = evopress("resume=run", "stages=[evaluate]")
    assert resumed.code == 0, resumed.text
    rows = json.loads((tmp_path / "run" / "result.json").read_text())["rows"]
    assert all(set(row["perplexity"]) == {"lines"} for row in rows) and len(rows) > 1


def test_options_from_the_command_line_are_enough(stories: list[str], tiny: Callable[..., Any], tmp_path: Path) -> None:
    outcome = tiny("data.source=lines", "+data.options={path: stories.txt}", "stages=[database]")
    assert outcome.code == 0, outcome.text
    refused = tiny("data.source=lines", "+data.options={file: stories.txt}", folder=tmp_path / "other")
    assert refused.code == 1 and len(refused.errors) == 1
    assert "the text source lines does not accept" in refused.errors[0] and "its options are path" in refused.errors[0]


def test_a_broken_package_is_one_sentence_before_any_work(
    install: Callable[..., Path], tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evopress.models.opening.load_pretrained", lambda *a, **k: pytest.fail("a model was loaded"))
    install("my_text", {"lines": "my_text:Lines"}, "import no_such_module", group="evopress.text_sources")
    outcome = tiny("data.source=lines")
    assert outcome.code == 1 and outcome.errors == [
        "error: the text source lines of package my_text 1.0 (my_text:Lines) could not be loaded (ModuleNotFoundError: "
        "No module named 'no_such_module'): repair that package, or choose another data.source"
    ]


def test_a_baseline_from_outside_is_a_row_and_a_start(
    install: Callable[..., Path], tiny: Callable[..., Any], tmp_path: Path
) -> None:
    blocks = examples("A baseline of your own")
    installed(blocks, install)
    (names,) = re.findall(r"'(baselines\.names=.*?)'", blocks["sh"])
    outcome = tiny(names, "search.starts=[deeper]", "stages=[database,baselines,search,evaluate]")
    assert outcome.code == 0, outcome.text
    row = {row["name"]: row for row in json.loads((tmp_path / "run" / "result.json").read_text())["rows"]}["deeper"]
    levels = json.loads((tmp_path / "run" / "baselines.json").read_text())["genomes"]["deeper"]
    assert row["bits_per_weight"] <= 3.5 and row["kl"] > 0
    assert levels == sorted(levels) and levels[0] < levels[-1]  # the last blocks most


def test_a_pruner_from_outside_makes_a_database_and_is_searched(
    install: Callable[..., Path], tiny: Callable[..., Any], evopress: Callable[..., Any], tmp_path: Path
) -> None:
    blocks = examples("A pruner of your own")
    installed(blocks, install)
    given = blocks["sh"].split("evopress ")[1].split()
    outcome = evopress(*given, "+debug=tiny", "hydra.run.dir=run", "stages=[database,baselines,search,evaluate,export]")
    assert outcome.code == 0, outcome.text
    rows = {row["name"]: row for row in json.loads((tmp_path / "run" / "result.json").read_text())["rows"]}
    assert rows["evopress"]["sparsity"] == pytest.approx(0.5, abs=1e-3) and rows["uniform"]["kl"] > 0
    uniform = evopress(
        *given, "+debug=tiny", "hydra.run.dir=other", "genome=uniform", "stages=[database,baselines,evaluate,export]"
    )
    assert uniform.code == 0, uniform.text
    (file,) = (tmp_path / "other").rglob("model.safetensors")
    fours = [w.reshape(-1, 4) for name, w in load_file(file).items() if name.endswith("_proj.weight")]
    assert len(fours) == 14 and all(((four != 0).sum(1) == 2).all() for four in fours), "the level of 50% is a 2:4 mask"


def test_a_fitness_from_outside_is_searched_by_both_strategies(
    install: Callable[..., Path], tiny: Callable[..., Any], evopress: Callable[..., Any], tmp_path: Path
) -> None:
    blocks = examples("A fitness of your own")
    installed(blocks, install)
    given = blocks["sh"].split("evopress ")[1].split()
    few = ("+debug=tiny", "search.generations=2", "stages=[database,search,report]")
    for strategy in ("evolution", "guided"):
        outcome = evopress(*given, *few, f"search/strategy={strategy}", f"hydra.run.dir={strategy}")
        assert outcome.code == 0, outcome.text
        records = [json.loads(line) for line in (tmp_path / strategy / "metrics.jsonl").read_text().splitlines()]
        found = [record["fitness"] for record in records if record["fitness"] is not None]
        assert found and min(found) > 0
    other = evopress(*given, *few, "search/strategy=evolution", "hydra.run.dir=evolution", "fitness.options.temperature=3")
    assert other.code == 1 and "had other settings (fitness.options" in other.errors[0]
    plain = [each for each in given if not each.startswith(("fitness.options", "+fitness.options"))]
    assert len(plain) < len(given) and evopress(*plain, *few, "search/strategy=evolution", "hydra.run.dir=plain").code == 0
    added = evopress("resume=plain", "+fitness.options.temperature=3")
    assert added.code == 1 and "had other settings (fitness.options" in added.errors[0]
    assert evopress("resume=plain", "search.generations=3").code == 0
    assert not list(tmp_path.rglob("archive.jsonl"))
    refused = tiny("fitness.name=reverse_kl", "+fitness.options.heat=2", folder=tmp_path / "refused")
    assert refused.code == 1 and "the measure reverse_kl does not accept fitness.options={'heat': 2}" in refused.errors[0]
    assert "its options are temperature=1.0" in refused.errors[0]


def test_a_measure_of_two_numbers_is_refused_before_any_work(
    install: Callable[..., Path], tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evopress.models.opening.load_pretrained", lambda *a, **k: pytest.fail("a model was loaded"))
    code = "class Part:\n    names = ('one', 'two')\n    def reference(self, *a): ...\n    def __call__(self, *a): ..."
    install("my_part", {"part": "my_part:Part"}, code, group="evopress.measures")
    outcome = tiny("fitness.name=part")
    assert outcome.code == 1 and len(outcome.errors) == 1
    assert "fitness.name=part is no measure of one number per token: give it `names` of one" in outcome.errors[0]


@pytest.mark.parametrize("strategy", ["evolution", "guided"])
def test_a_measure_of_another_shape_is_refused_in_a_sentence(
    strategy: str, install: Callable[..., Path], tiny: Callable[..., Any]
) -> None:
    code = "class Flat:\n    names = ('flat',)\n    def reference(self, *a): ...\n    def __call__(self, h, *a): return h.sum(-1)"
    install("my_flat", {"flat": "my_flat:Flat"}, code, group="evopress.measures")
    outcome = tiny("fitness.name=flat", f"search/strategy={strategy}", "baselines.names=[]")
    assert outcome.code == 1 and len(outcome.errors) == 1
    assert re.search(r"the measure flat returned \[(\d+)\] for \1 tokens, expected \[1, \1\]: let its __call__", outcome.errors[0])


BASELINE = """
from evopress.baselines.baseline import Baseline

class Part(Baseline):
    serves = frozenset({"weights"})
    def find(self, problem):
        return %s
"""
PRUNER = """
from dataclasses import asdict, dataclass
from evopress.compress.sparse import Sparse, SparsityLevels, to_float32
from evopress.compress.compressor import with_errors

@dataclass(frozen=True, kw_only=True)
class Part(SparsityLevels):
    %s
    def prune(self, weights, H, kept):
        return {
            name: with_errors([Sparse.of(weights[name], W.abs() > W.abs().median(), weights[name].dtype) for _ in kept[name]], W, H)
            for name, W in to_float32(weights, H.device).items()
        }
"""
SETTINGS = "def settings(self): return asdict(self)"
TEXT = """
class Part:
    name = "part"
    def identity(self):
        return %s
    def documents(self, split):
        yield %s
"""
QUANT = ("+method=quant", "bits=3.5", "baselines.names=[part]")
SPARSE, READ = ("+method=sparsity", "sparsity=0.3", "method.compressor=part"), ("+method=quant", "bits=3.5", "data.source=part")


@pytest.mark.parametrize(
    ("group", "code", "given", "words"),
    [
        ("baselines", BASELINE % '{"dense": (0,) * 14}', QUANT, "part gives a row 'dense', the name of the dense model in results"),
        (
            "baselines",
            BASELINE % '{"evopress": (0,) * 14}',
            QUANT,
            "a row 'evopress', the name of what is found in results: rename it",
        ),
        (
            "baselines",
            BASELINE % '{"short": (0,)}',
            QUANT,
            r"the baseline part gives a row 'short' that is no genome .* has 1 levels",
        ),
        (
            "baselines",
            BASELINE % '{"EvoPress": (0,) * 14}',
            QUANT,
            "a row 'EvoPress', the name of what is found in results: rename",
        ),
        ("baselines", BASELINE % '{"DP": (0,) * 14}', QUANT, "a row 'DP', the name of the baseline dp in results: rename it"),
        (
            "baselines",
            BASELINE % '{"own": (1,) * 14, "owl": (1,) * 14}',
            QUANT,
            "a row 'owl', the name of the baseline owl in results: rename it, or leave part out of baselines.names",
        ),
        ("baselines", BASELINE % '{"a/b": (0,) * 14}', QUANT, r"a row 'a/b', which genome=NAME cannot give: name it by letters"),
        ("baselines", BASELINE % "{7: (0,) * 14}", QUANT, r"a row 7, which genome=NAME cannot give"),
        ("baselines", BASELINE % "None", QUANT, "the baseline part finds None, expected a genome by the name of its row"),
        (
            "baselines",
            BASELINE.replace("def find", "def seek") % "None",
            QUANT,
            "the baseline part cannot be made .*find.*: repair it",
        ),
        (
            "pruners",
            PRUNER % SETTINGS,
            SPARSE,
            r"the pruner Part keeps \[.*\] of the \d+ weights of model\.layers\.0\..*, asked for \[.*\]: fix it, or choose",
        ),
        ("pruners", PRUNER % "", SPARSE, "method.compressor=part is no pruner: expected a subclass of"),
        ("pruners", "class Part:\n    def __init__(self, **given): pass", SPARSE, "is no pruner"),
        (
            "text_sources",
            TEXT % ("{}", "open('nowhere.txt').read()"),
            READ,
            r"the text source part cannot be read \(FileNotFoundError: .*nowhere\.txt'\): check data\.options",
        ),
        (
            "text_sources",
            TEXT % ("{}", "'a'") + "    def __init__(self): open('nowhere.txt')\n",
            READ,
            r"text source part of package my_part 1.0 \(my_part:Part\) cannot be made \(FileNotFoundError: .*nowhere\.txt'\): give",
        ),
        ("text_sources", TEXT % ("{1: b'x'}", "'a'"), READ, "cannot be read .TypeError"),
        ("text_sources", TEXT % ("{}", "b'bytes'"), READ, "cannot be read .TypeError"),
    ],
)
def test_a_part_that_is_wrong_is_one_sentence(
    group: str, code: str, given: tuple[str, ...], words: str, install: Callable[..., Path], evopress: Callable[..., Any]
) -> None:
    install("my_part", {"part": "my_part:Part"}, code, group=f"evopress.{group}")
    outcome = evopress(*given, "+debug=tiny", "hydra.run.dir=run", "stages=[database,baselines,search,evaluate]")
    assert outcome.code == 1 and len(outcome.errors) == 1 and "Traceback" not in outcome.text, outcome.text
    assert re.search(words, outcome.errors[0]), outcome.errors


def test_a_baseline_over_the_budget_is_told_and_marked(
    install: Callable[..., Path], evopress: Callable[..., Any], tmp_path: Path
) -> None:
    install("my_part", {"part": "my_part:Part"}, BASELINE % '{"over": (0,) * 14}', group="evopress.baselines")
    names = "baselines.names=[part,uniform]"
    outcome = evopress(*QUANT[:2], names, "+debug=tiny", "hydra.run.dir=run", "stages=[database,baselines,evaluate]")
    assert outcome.code == 0, outcome.text
    told = [line for line in outcome.text.splitlines() if "over the budget" in line]
    assert len(told) == 1 and "the baseline part gives a row 'over' over the budget of 3.5 bits per weight" in told[0], outcome.text
    rows = {row["name"]: row for row in json.loads((tmp_path / "run" / "result.json").read_text())["rows"]}
    assert rows["over"]["within_budget"] is False


def test_a_row_of_another_name_than_its_baseline_is_given_by_its_own(
    install: Callable[..., Path], evopress: Callable[..., Any], tmp_path: Path
) -> None:
    install("my_part", {"part": "my_part:Part"}, BASELINE % '{"low": (2,) * 14}', group="evopress.baselines")
    run = (*QUANT, "+debug=tiny", "hydra.run.dir=run", "stages=[database,baselines,evaluate]")
    assert evopress(*run).code == 0
    outcome = evopress("resume=run", "genome=low", "search.starts=[low]", "stages=[search,export]", "search.generations=1")
    assert outcome.code == 0 and (tmp_path / "run" / "genomes" / "low" / "checkpoint" / "model.safetensors").exists(), outcome.text
    refused = evopress("resume=run", "genome=lower", "stages=[export]")
    assert refused.code == 1 and "genome has 'lower', which is neither a file nor among this run's" in refused.errors[0]


def test_an_exporter_that_cannot_count_is_refused_before_it_writes(
    install: Callable[..., Path], evopress: Callable[..., Any]
) -> None:
    code = (
        "class Part:\n    def check(self, config, forms): pass\n    def num_bytes(self, export): return 'many'\n"
        "    def write(self, folder, export): raise AssertionError\n"
    )
    install("my_part", {"part": "my_part:Part"}, code, group="evopress.exporters")
    given = ("genome=uniform_3", "stages=[database,export]", "export=[part]")
    outcome = evopress(*QUANT[:2], "+debug=tiny", "hydra.run.dir=run", *given)
    assert outcome.code == 1 and "the exporter part says that its weight file takes 'many' bytes" in outcome.errors[0], outcome.text
