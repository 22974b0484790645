"""Settings are written once: what a run can be told is declared in one class, which is the one that its user takes."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import evopress.__main__

PACKAGE = Path(evopress.__main__.__file__).parent
STRATEGIES = {"search.EvolutionStrategy", "search.GuidedStrategy"}
"""What Hydra registers beside the classes of settings.py."""

OTHER_THINGS = (
    "bits data device dtype experts files fitness genome levels method model name names options path refine revision root scale "
    "size source stages starts step tokens tracker"
)
"""Words that are no doubling: a record, a shape or a tensor has a field of that name, and means something else by it."""

DOUBLED = {
    "a scale says what becomes of the paper's numbers, or of text, where nothing else is said": {
        "attribution_tokens": "search.GuidedStrategy settings.ScaleSettings",
        "calibration_tokens": "settings.DataSettings settings.ScaleSettings",
        "evaluation_tokens": "settings.DataSettings settings.ScaleSettings",
        "generations": "search.SearchSettings settings.PaperNumbers settings.ScaleSettings",
        "initial_tokens": "search.SearchSettings settings.LeastShares settings.PaperNumbers",
        "num_offspring": "search.SearchSettings settings.LeastShares settings.PaperNumbers",
        "random_tokens": "settings.BaselinesSettings settings.ScaleSettings",
        "screen_tokens": "search.GuidedStrategy settings.ScaleSettings",
        "search_tokens": "baselines.Planned settings.DataSettings settings.ScaleSettings",
        "survivors": "search.SearchSettings search.StageRecord settings.LeastShares settings.PaperNumbers",
    },
    "compressors are frozen, stand alone, and packages' own inherit from them; a composed config cannot be frozen": {
        "block_size": "compress.GGUFLevels compress.GPTQ compress.SparseGPT settings.WeightSettings",
        "damping": "compress.Compressed compress.GGUFLevels compress.GPTQ compress.SparseGPT settings.WeightSettings",
        "group_sizes": "compress.GPTQ settings.QuantSettings",
        "num_levels": "compress.SparsityLevels settings.SparsitySettings",
        "recipe": "compress.GPTQ compress.SparseGPT levels.WalkSettings settings.WeightSettings",
        "tolerance": "compress.GGUFLevels compress.GPTQ settings.QuantSettings",
        "zeros": "compress.GPTQ compress.Quantized settings.QuantSettings",
        # of an export's form too, which is what its levels came out as
        "group_size": "compress.GPTQ export.Form settings.ModelSettings settings.QuantSettings",
        "scale_dtype": "compress.GPTQ export.Form settings.QuantSettings",
        "symmetric": "compress.GPTQ export.Form settings.QuantSettings",
    },
    "levels/, fitness/ and evaluation/ read models, which read settings, and take numbers alone": {
        "activations": "levels.WalkSettings settings.LevelDatabaseSettings",
        "batch_tokens": "levels.WalkSettings settings.LevelDatabaseSettings",
        "correction": "levels.WalkSettings levels.Walking settings.QuantSettings settings.RefineSettings",
        "k": "fitness.TopkKL settings.FitnessSettings",
        "tasks": "evaluation.TaskGroup evaluation.ZeroShot settings.EvaluationSettings",
    },
    "a method takes its target out of the run, where it may be missing, and joint what is gone from the start": {
        "dropped": "methods.Modules settings.JointSettings",
        "engine": "methods.Joint methods.Quantization settings.RunSettings",
        "exchange": "methods.Drop methods.Joint search.SearchSettings",
        "limits": "methods.Drop methods.Joint methods.Quantization methods.Sparsity settings.RunSettings units.Budget",
        "sparsity": "compress.SparsityLevels methods.Drop methods.Sparsity settings.RunSettings",
    },
    "files are those of a run's splits, or of a data set that is held out": {
        "calibration": "data.TextFiles settings.DataSettings",
        "evaluation": "data.TextFiles settings.DataSettings settings.RunSettings",
        "field": "compress.Plane data.TextFiles settings.DataSettings settings.EvaluationSettings",
        "search": "data.TextFiles settings.DataSettings settings.RunSettings",
        "wikitext": "data.HubText data.TextFiles settings.DataSettings settings.EvaluationSettings",
    },
}
"""Why a setting's name stands in several classes, and in which: room and class."""


def dataclasses_of(path: Path) -> dict[str, tuple[list[str], set[str]]]:
    """Return a file's dataclasses: the names of the classes that they inherit from, and the fields that they declare."""
    room, found = path.relative_to(PACKAGE).parts[0].removesuffix(".py"), {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(each) for each in node.decorator_list):
            declared = [each for each in node.body if isinstance(each, ast.AnnAssign) and "ClassVar" not in ast.unparse(each)]
            fields = {each.target.id for each in declared if isinstance(each.target, ast.Name)}
            found[f"{room}.{node.name}"] = ([ast.unparse(base) for base in node.bases], fields)
    return found


def doubled(classes: dict[str, tuple[list[str], set[str]]]) -> dict[str, str]:
    """Return the fields that a class of settings declares and another class too, neither of which inherits from the other."""

    def above(name: str) -> set[str]:
        bases = {other for other in classes if other.partition(".")[2] in classes[name][0]}
        return bases.union(*map(above, bases))

    settings = {name for name in classes if name.startswith("settings.")} | STRATEGIES
    settings |= set().union(*map(above, settings))
    declare: dict[str, set[str]] = defaultdict(set)
    for name, (_, fields) in classes.items():
        for each in fields.difference(*(classes[base][1] for base in above(name))):
            declare[each].add(name)
    return {each: " ".join(sorted(names)) for each, names in declare.items() if len(names) > 1 and names & settings}


def test_no_setting_is_declared_twice_without_a_reason() -> None:
    classes = {name: each for path in sorted(PACKAGE.rglob("*.py")) for name, each in dataclasses_of(path).items()}
    found = doubled(classes)
    allowed = {field: names for fields in DOUBLED.values() for field, names in fields.items()}
    words = set(OTHER_THINGS.split())
    assert {field: names for field, names in found.items() if field not in words} == allowed
    assert words <= set(found), "a word that is doubled nowhere needs no mention"


def test_a_doubling_is_found() -> None:
    """As that of ten numbers of the search was, in a class that its algorithm took and another that Hydra registered."""
    classes = {
        "settings.SearchConfig": ([], {"num_offspring", "starts"}),
        "search.Numbers": (["Shared"], {"num_offspring", "max_level"}),
        "search.Shared": ([], {"max_level"}),
        "search.EvolutionStrategy": (["Shared"], {"max_level"}),
        "search.GuidedStrategy": ([], set()),
    }
    assert doubled(classes) == {"num_offspring": "search.Numbers settings.SearchConfig"}
