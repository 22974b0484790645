"""The stage export in other formats: beside a finished run, refused before any work, from an installed package."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from evopress.models.tiny import byte_tokenizer
from evopress.progress import millions
from evopress.stages.exports import add_sizes, served
from experiments.tiny_any import any_model

GUIDE = (Path(__file__).parents[2] / "docs" / "exports.md").read_text(encoding="utf-8")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def finished_32(invoked: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run whose groups MLX holds, up to its evaluation and checkpoint."""
    cwd = tmp_path_factory.mktemp("groups_of_32")
    few = ("baselines.names=[uniform]", "evaluation.every=0", "stages=[database,baselines,search,evaluate,export]")
    outcome = invoked("model.group_size=32", "hydra.run.dir=run", *few, cwd=cwd)
    assert outcome.code == 0, outcome.text
    return Path(cwd / "run")


@pytest.fixture
def copied(finished_32: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_32, tmp_path / "run"))


def test_a_finished_run_is_exported_once_more(copied: Path, evopress: Callable[..., Any]) -> None:
    before = contents(copied)
    told = json.loads(before["finished.json"])
    assert "exports" not in told
    outcome = evopress("resume=run", "stages=[export]", "export=[mlx]")
    assert outcome.code == 0, outcome.text
    after, folder = contents(copied), copied / "exports" / "mlx"
    assert {path for path in before if path.startswith("checkpoint/") and after[path] != before[path]} == set()
    finished = json.loads(after["finished.json"])
    assert finished == {**told, "exports": {"dequantized": {}, "mlx": {}}}  # the settings' digest among it
    assert [path.name for path in copied.joinpath("exports").iterdir()] == ["mlx"]
    size = (folder / "model.safetensors").stat().st_size
    result = json.loads(after["result.json"])
    assert result["exports"] == {"mlx": {"bytes": size}}
    (row,) = [row for row in result["rows"] if row["name"] == "evopress"]
    assert row["exports"] == result["exports"] and row["checkpoint_bytes"] > 0
    assert not any("exports" in row for row in result["rows"] if row["name"] != "evopress")
    assert json.loads((folder / "evopress.json").read_text())["export"] == {"format": "mlx", "options": {}, "bytes": size}
    assert (folder / "genome.json").read_bytes() == before["genome.json"]
    card = (folder / "README.md").read_text()
    assert f"{row['perplexity']['python_docs']:.2f}" in card and f"| {millions(size)} |" in card and "mlx MB" in card


def test_a_run_ends_with_the_commands_that_serve_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, size in (("mlx", 1_250_000), ("compressed_tensors", 2_000_000)):
        (tmp_path / "run" / "exports" / name).mkdir(parents=True)
        (tmp_path / "run" / "exports" / name / "model.safetensors").write_bytes(bytes(size))
    asked = ["dequantized", "mlx", "gguf", "compressed_tensors"]  # gguf has not been written
    settings: Any = SimpleNamespace(stages=["export"], export=asked, export_options={})
    workspace: Any = SimpleNamespace(settings=settings, blocks=SimpleNamespace(dtype=torch.bfloat16))
    assert list(served(workspace, tmp_path / "run")) == [
        "mlx, 1.2 MB: mlx_lm.server --model run/exports/mlx",
        "compressed_tensors, 2.0 MB: vllm serve run/exports/compressed_tensors --dtype bfloat16",
    ]
    (tmp_path / "run").rename(tmp_path / "a run (1)")
    commands = [line.partition(": ")[2] for line in served(workspace, tmp_path / "a run (1)")]
    assert shlex.split(commands[0]) == ["mlx_lm.server", "--model", "a run (1)/exports/mlx"]
    assert shlex.split(commands[1])[:3] == ["vllm", "serve", "a run (1)/exports/compressed_tensors"]


def test_a_row_has_the_sizes_of_files_that_hold_its_weights_now(tmp_path: Path) -> None:
    """Written refined, then as found: the checkpoint and MLX are the latter's, GGUF is the former's still."""
    (tmp_path / "genome.json").write_text("found")
    for name, told in (("checkpoint", {}), ("exports/mlx", {"export": {"bytes": 7}}), ("exports/gguf", {"refined": {}})):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "genome.json").write_text("found")
        (folder / "evopress.json").write_text(json.dumps({"export": {"bytes": 8}, **told}))
        (folder / "model.safetensors").write_bytes(bytes(9))
    earlier = {"checkpoint_bytes": 5, "exports": {"mlx": {"bytes": 5}}}
    rows: list[dict[str, Any]] = [{"name": name, **earlier} for name in ("uniform_3", "evopress", "evopress_refined")]
    add_sizes(rows, SimpleNamespace(run_dir=tmp_path))  # type: ignore[arg-type]
    assert rows == [
        {"name": "uniform_3"},
        {"name": "evopress", "checkpoint_bytes": 9, "exports": {"mlx": {"bytes": 7}}},
        {"name": "evopress_refined", "exports": {"gguf": {"bytes": 8}}},
    ]


def test_exact_scales_of_a_named_genome(copied: Path, evopress: Callable[..., Any]) -> None:
    own = "+export_options.mlx.scales=float32"
    outcome = evopress("resume=run", "stages=[evaluate,export]", "export=[mlx]", "genome=uniform_3", own)
    assert outcome.code == 0, outcome.text
    assert not (copied / "exports").exists()
    with safe_open(copied / "genomes" / "uniform_3" / "exports" / "mlx" / "model.safetensors", framework="np") as file:
        assert {str(file.get_tensor(key).dtype) for key in file.keys() if key.endswith(".scales")} == {"float32"}  # noqa: SIM118
    rows = {row["name"]: row for row in json.loads((copied / "result.json").read_text())["rows"]}
    assert rows["uniform_3"]["exports"]["mlx"]["bytes"] > 0 and "exports" not in rows["evopress"]
    left = copied / "genomes" / "uniform_3" / "exports" / ".gguf.tmp"  # by a run that was killed
    left.mkdir()
    (left / "half.gguf").write_text("x")
    outcome = evopress("resume=run", "stages=[evaluate,export,report]", "export=[mlx]", "genome=dp")
    assert outcome.code == 0, outcome.text
    assert not left.exists() and "run/genomes/dp/exports/mlx" in outcome.text and "--model run/exports" not in outcome.text
    rows = {row["name"]: row for row in json.loads((copied / "result.json").read_text())["rows"]}
    assert all(list(rows[name]["exports"]) == ["mlx"] for name in ("uniform_3", "dp"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["export=[mlx]"], "at 6 bits in groups of 16: MLX has groups of 32, 64, 128; set method.group_size"),
        (["export=[mlx]", "method.levels=[7,4,3,2]", "method.group_size=32"], "at 7 bits in groups of 32: MLX has 1, 2, 3"),
        (["export=[ml]"], "export=ml is unknown: choose one of dequantized, mlx"),
        (["export=[]"], "export is empty"),
        (["export=mlx"], "write 'export=[mlx]'"),
        (["+export_options.mlx.scales=float32"], "export_options has mlx, which is not in export=['dequantized']"),
        (["export=[mlx]", "+export_options.mlx.bits=3"], "the exporter mlx does not accept"),
        (["export=[mlx]", "+export_options.mlx.scales=bfloat16"], "choose float16 or float32"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_before_anything_is_built(
    arguments: list[str], sentence: str, tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evopress.databases.ensure_database", lambda *a, **k: pytest.fail("levels were built"))
    outcome = tiny(*arguments, "method.propagate_bits=4")
    assert outcome.code == 1 and len(outcome.errors) == 1 and sentence in outcome.errors[0], outcome.text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("model_type", "wanted", "sentence"),
    [
        ("opt", "export=[dequantized,mlx]", "export=[mlx] is not written for models of type opt"),
        ("opt", "export=[gguf]", "export=[gguf] cannot hold a model of type opt"),
        ("stablelm", "export=[compressed_tensors]", "export=[compressed_tensors] cannot hold a model of type stablelm"),
        ("opt", "engine=mlx", "engine=mlx: export=[mlx] is not written for models of type opt"),
    ],
)
def test_a_kind_of_model_that_a_format_does_not_know_is_refused_before_its_weights_are_read(
    model_type: str, wanted: str, sentence: str, evopress: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    any_model(model_type).save_pretrained(tmp_path / model_type)
    byte_tokenizer().save_pretrained(tmp_path / model_type)
    monkeypatch.setattr("evopress.models.opening.load_pretrained", lambda *a, **k: pytest.fail("the model was loaded"))
    model = ("model=local", f"model.path={tmp_path / model_type}", "model.group_size=32", "model.sequence_length=64")
    outcome = evopress("+method=quant", "bits=3", "+debug=tiny", *model, wanted, "hydra.run.dir=run")
    assert outcome.code == 1 and len(outcome.errors) == 1 and sentence in outcome.errors[0], outcome.text
    assert not (tmp_path / "run").exists()


def test_sparse_levels_are_refused(sparse: Callable[..., Any]) -> None:
    outcome = sparse("export=[mlx]")
    assert outcome.code == 1 and "cannot hold sparse weights" in outcome.errors[0], outcome.text


def test_a_genome_that_fits_is_exported_though_other_levels_would_not(evopress: Callable[..., Any], tmp_path: Path) -> None:
    levels = ("method.levels=[7,4]", "method.propagate_bits=4", "method.group_size=32", "stages=[export]", "export=[mlx]")
    common = ("+method=quant", "bits=4.5", "+debug=tiny", f"hydra.run.dir={tmp_path / 'run'}", *levels)
    outcome = evopress(*common, "genome=uniform_4")
    assert outcome.code == 0, outcome.text
    assert (tmp_path / "run" / "genomes" / "uniform_4" / "exports" / "mlx" / "model.safetensors").is_file()
    refused = evopress(*common, "genome=uniform_7")
    assert refused.code == 1 and "7 bits" in refused.errors[0]


def test_an_exporter_from_outside_writes_its_folder(
    copied: Path, evopress: Callable[..., Any], install: Callable[..., Path]
) -> None:
    """The example of docs/exports.md."""
    section = GUIDE.split("## A format of your own\n", 1)[1]
    blocks = dict(re.findall(r"^```(\w+)\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL))
    (group,) = re.findall(r'entry-points\."([\w.]+)"', blocks["toml"])
    ((name, point),) = re.findall(r'^(\w+) = "([\w.:]+)"$', blocks["toml"], flags=re.MULTILINE)
    install(point.partition(":")[0], {name: point}, blocks["python"], group=group)
    (asked,) = re.findall(r"'(export=.*?)'", blocks["sh"])
    outcome = evopress("resume=run", "stages=[export]", asked)
    assert outcome.code == 0, outcome.text
    lines = (copied / "exports" / name / "levels.tsv").read_text().splitlines()
    units = json.loads((copied / "genome.json").read_text())["units"]
    assert [line.split("\t")[0] for line in lines] == [unit["name"] for unit in units]
    written = sum(path.stat().st_size for path in (copied / "exports" / name).iterdir())
    assert json.loads((copied / "result.json").read_text())["exports"] == {name: {"bytes": written}}
