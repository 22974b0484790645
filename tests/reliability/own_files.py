"""Every JSON file of ours: how a whole one is made, and how it is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evopress.compress.gptq import GPTQ
from evopress.errors import EvoPressError
from evopress.files import seal
from evopress.finished import FINISHED, settings_digest, stages_done
from evopress.levels.build import _finished_blocks
from evopress.levels.hessians import BlockHessians, HessianStore
from evopress.levels.refine import Step
from evopress.levels.store import MANIFEST, LevelDatabase, encoded, write_block, write_manifest
from evopress.models.loading import find_weights
from evopress.reporting.generations import read_generations
from evopress.reporting.records import append_record, read_genome, write_genome, write_json
from evopress.run_folder import keep_overrides, kept_overrides
from evopress.search.evolution import Evolution, SearchSettings
from evopress.search.strategy import run_search
from evopress.settings import DataSettings, LevelDatabaseSettings, PathsSettings, QuantSettings, RunSettings, ScaleSettings
from evopress.stages.baselines import read_baselines
from evopress.stages.refine import said, summary_of
from evopress.stages.results import read_result
from evopress.stages.search import go_on
from evopress.units import Budget, Level, Space, Unit

SPACE = Space(
    "quant",
    tuple(
        Unit(f"layers.{i}.up", i, "up", 96, tuple(Level(f"{bits} bits", bits * 96, str(bits), bits * 96) for bits in (4, 3, 2)))
        for i in range(4)
    ),
)
BUDGET = Budget(total=3 * SPACE.size - 96, target=2.75, measure="bits per weight")
RUN = RunSettings(
    method=QuantSettings(),
    data=DataSettings(source="python_docs"),
    level_db=LevelDatabaseSettings(root="levels"),
    scale=ScaleSettings(name="mini"),
    paths=PathsSettings(cache="cache"),
)


@dataclass(frozen=True)
class Reader:
    """A file of ours, how a whole one is made, and how it is read."""

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    sealed: bool = False
    """It has a digest of its own, which a liar computes anew."""
    lines: bool = False
    """It is a file of JSON lines."""
    versioned: bool = True
    """It has a schema number."""


def search() -> tuple[Evolution, np.random.Generator]:
    numbers = SearchSettings(3, 4, [2, 1], [8, 16], 4, 8, 3, "min_uniform", "any")
    return Evolution(SPACE, BUDGET, numbers, rng_initial=np.random.default_rng(0), rng_mutation=np.random.default_rng(1)), (
        np.random.default_rng(2)
    )


def make_search(folder: Path) -> None:
    evolution, rng = search()
    seconds = iter(range(100))

    def keep(record: Any) -> None:
        append_record(folder / "metrics.jsonl", {"schema": 1, **record.to_dict(), "seconds": next(seconds)})

    run_search(evolution, lambda genomes, tokens: [float(sum(genome)) for genome in genomes], on_generation=keep)
    state = {"schema": 1, "database": "d", "evolution": evolution.state(), "rng_minibatch": rng.bit_generator.state, "seconds": 1.5}
    write_json(folder / "state.json", state, sealed=True)
    names = folder / "genome.json", folder / "genome.txt"
    write_genome(*names, space=SPACE, genome=evolution.parent, database="d", budget=BUDGET)


def make_database(folder: Path, *, journal: bool = False) -> None:
    gptq = GPTQ(bits=(4, 3, 2), group_size=8)
    entries = []
    for block in range(2):
        name = f"layers.{block}.up"
        weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(block))
        units = {name: Unit(name, block, "up", 96, gptq.levels((6, 16)))}
        compressed = {name: list(levels) for name, levels in gptq.compress({name: weight}, torch.eye(16)).items()}
        entries.append(write_block(folder, block, [encoded(compressed, units)], list(compressed)))
    if journal:
        lines = [json.dumps(seal({"schema": 1, "database": folder.name, **entry})) for entry in entries]
        (folder / "journal.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        steps = [Step(0, True, 2.0, 1.5).to_dict(), Step(1, False, None, None).to_dict()]  # as refined levels have
        write_manifest(folder, method="quant", fingerprint="f" * 16, recipe={"a": 1}, entries=entries, further={"steps": steps})


def read_database(folder: Path) -> None:
    database = LevelDatabase.open(folder)
    assert len(database.errors) == len(database.space)
    assert said(summary_of(database))
    for i, unit in enumerate(database.space.units):
        for j in range(len(unit.levels)):
            assert database.read(i, j).decode().numel() == unit.size


def make_hessians(folder: Path) -> None:
    HessianStore(folder).write(0, BlockHessians({"a": "a", "b": "a"}, {"a": torch.eye(3)}))


def read_hessians(folder: Path) -> None:
    store = HessianStore(folder)
    if 0 in store:
        block = store.read(0)
        assert {block.hessians[owner].ndim for owner in block.owners.values()} <= {2}


def make_baselines(folder: Path) -> None:
    genomes = {"dp": [0, 1, 2, 2], "best_of_4": [1, 1, 1, 1]}
    stored = {"schema": 1, "database": "d", "further": [f"owl-{'0' * 16}"], "genomes": genomes, "orders": {"shortgpt": [1]}}
    write_json(folder / "baselines.json", stored, sealed=True)


def make_result(folder: Path) -> None:
    rows = [{"name": "evopress", "kl": 0.5, "perplexity": {"docs": 3.0}}]
    write_json(folder / "result.json", {"schema": 1, "rows": rows, "search": {"tokens": 5}, "database": {"bytes": 1}, "memory": {}})


def make_finished(folder: Path) -> None:
    make_result(folder)
    write_json(folder / FINISHED, {"schema": 1, "settings": settings_digest(RUN), "stages": ["database", "search"]})


def make_config(folder: Path) -> None:
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 257, "quantization_config": None}
    write_json(folder / "config.json", {"model_type": "llama", "max_position_embeddings": 512, **sizes})
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (folder / name).write_bytes(b"")
    shards = {f"layers.{i}": f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)}
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 5}, "weight_map": shards})


READERS = [
    Reader("genome.json", make_search, lambda folder: SPACE.check(read_genome(folder / "genome.json", SPACE, database="d"))),
    Reader("genome.txt", make_search, lambda folder: SPACE.check(read_genome(folder / "genome.txt", SPACE)), versioned=False),
    Reader("metrics.jsonl", make_search, lambda folder: read_generations(folder / "metrics.jsonl", SPACE), lines=True),
    Reader("state.json", make_search, lambda folder: go_on(folder / "state.json", *search(), database="d"), sealed=True),
    Reader("result.json", make_result, read_result),
    Reader("baselines.json", make_baselines, lambda folder: read_baselines(folder / "baselines.json"), sealed=True),
    Reader(FINISHED, make_finished, lambda folder: stages_done(RUN, folder)),
    Reader(".hydra/overrides.json", lambda folder: keep_overrides(folder, ["a=1"]), kept_overrides),
    Reader(MANIFEST, make_database, read_database, sealed=True),
    Reader(
        "journal.jsonl",
        lambda folder: make_database(folder, journal=True),
        lambda folder: _finished_blocks(folder, 2),
        sealed=True,
        lines=True,
    ),
    Reader("block-000.json", make_hessians, read_hessians),
    Reader("config.json", make_config, find_weights, versioned=False),
    Reader("model.safetensors.index.json", make_config, find_weights, versioned=False),
]


def check(read: Callable[[Path], Any], folder: Path) -> Any:
    """Read; the only error that there may be is one sentence."""
    try:
        return read(folder)
    except EvoPressError as error:
        told = error
    assert "\n" not in str(told)
    assert len(str(told)) < 2000
    return told
