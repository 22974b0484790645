"""What tests of several rooms share: tiny models, made-up tokens, level databases of them, and the slow references on the path."""

from __future__ import annotations

import gc
import hashlib
import importlib
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from evopress.compress.gptq import GPTQ
from evopress.data.opening import RunText
from evopress.levels.build import ensure_database
from evopress.levels.live import LiveModel
from evopress.levels.plan import BuildSettings
from evopress.models.blocks import BlockModel
from evopress.models.loading import load_pretrained
from evopress.models.tiny import VOCABULARY, make_tiny
from evopress.reporting import drawing
from evopress.settings import DataSettings, EvaluationSettings, ModelSettings

sys.path.insert(0, str(Path(__file__).parent / "reference"))
torch.set_num_threads(1)
transformers_logging.disable_progress_bar()
gc.disable()  # until all tests are imported

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text", "opt")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what slow_tests.yaml lists, but every n-th case of it."""
    here, seen = Path(__file__).parent, Counter[tuple[str, str]]()
    listed = yaml.safe_load((here / "slow_tests.yaml").read_text(encoding="utf-8"))
    for item in items:
        if here not in item.path.parents:
            continue
        test = item.path.relative_to(here).as_posix(), item.name.partition("[")[0]
        kept = listed.get(test[0], {}).get(test[1])
        if kept is not None:
            if not kept or seen[test] % kept:
                item.add_marker(pytest.mark.slow)
            seen[test] += 1


def pytest_collection_finish() -> None:
    """Take what has been imported by now out of every later collection of garbage; a run makes one, among others."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture
def sketched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the figures of runs be made, but not drawn: that takes as long as all else in a tiny run."""
    from in_process import sketch

    monkeypatch.setattr(drawing, "_render", sketch)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return the checkpoint folder of a tiny random model of a family, made once."""
    root = tmp_path_factory.mktemp("models")

    def folder(model_type: str = "llama", *, num_blocks: int = 2, seed: int = 0) -> Path:
        path = root / f"{model_type}-{num_blocks}-{seed}"
        return path if path.exists() else make_tiny(path, model_type, num_blocks=num_blocks, seed=seed)

    return folder


@pytest.fixture(scope="session")
def tiny_blocks(tiny_folder: Callable[..., Path]) -> Callable[..., BlockModel]:
    """Load a tiny model anew, block by block."""

    def blocks(model_type: str = "llama", *, num_blocks: int = 2, dtype: str = "float32", seed: int = 0) -> BlockModel:
        pretrained = load_pretrained(tiny_folder(model_type, num_blocks=num_blocks, seed=seed), dtype=dtype)
        return BlockModel(pretrained.model, pretrained.family)

    return blocks


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return what puts a package with entry points on the path, as an installer would; it lasts as long as the test."""
    root = tmp_path / "site-packages"
    root.mkdir()
    monkeypatch.syspath_prepend(root)
    monkeypatch.setenv("PYTHONPATH", f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")

    def put(package: str, points: dict[str, str], code: str = "", *, group: str) -> Path:
        info = root / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = "".join(f"{name} = {value}\n" for name, value in points.items())
        (info / "entry_points.txt").write_text(f"[{group}]\n{lines}")
        (root / f"{package}.py").write_text(code)
        monkeypatch.delitem(sys.modules, package, raising=False)
        importlib.invalidate_caches()  # a folder that changed twice within one tick of its clock looks as it was
        return root

    return put


def make_tokens(count: int, length: int, *, seed: int = 0) -> Tensor:
    """Draw made-up token ids int64 [count, length]."""
    return torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def tokens() -> Callable[..., Tensor]:
    return make_tokens


@pytest.fixture(scope="session")
def compressor() -> GPTQ:
    return GPTQ(bits=(4, 3, 2), group_size=16)


def make_settings(root: Path, *, propagate: str | None = "3", **changes: object) -> BuildSettings:
    """Settings of a small database in a folder."""
    settings: dict[str, object] = {
        "root": root,
        "method": "quant",
        "model_name": "tiny",
        "recipe": {"model": "tiny", "propagate": propagate},
        "propagate": propagate,
        "batch_tokens": 64,
        "lock_timeout": 60.0,
    }
    return BuildSettings(**(settings | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def build_settings() -> Callable[..., BuildSettings]:
    return make_settings


@pytest.fixture(scope="session")
def live_model(
    tiny_blocks: Callable[..., BlockModel], compressor: GPTQ, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., LiveModel]:
    """Return a tiny model of a family with its level database (4, 3 and 2 bits), built once; leave it dense."""
    root = tmp_path_factory.mktemp("databases")
    made: dict[tuple[str, int, str], LiveModel] = {}

    def live(model_type: str = "llama", *, num_blocks: int = 4, dtype: str = "float32") -> LiveModel:
        key = (model_type, num_blocks, dtype)
        if key not in made:
            blocks = tiny_blocks(model_type, num_blocks=num_blocks, dtype=dtype)
            settings = make_settings(root, model_name=f"{model_type}-{num_blocks}-{dtype}")
            database, _ = ensure_database(settings, blocks, make_tokens(8, 32), compressor)
            made[key] = LiveModel(blocks, database)
        return made[key]

    return live


def hash_weights(model: nn.Module) -> str:
    """SHA-256 over every byte of a model's state."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="session")
def weights_digest() -> Callable[[nn.Module], str]:
    return hash_weights


@pytest.fixture
def text_of_tiny() -> Callable[..., RunText]:
    """Return what gives a model of the library, the built-in tiny one, the text that a run with `+debug=tiny` has."""

    def text(model: Any, cache: Path) -> RunText:
        return RunText(
            DataSettings(source="python_docs", calibration_tokens=1024, search_tokens=2048),
            EvaluationSettings(),
            ModelSettings(sequence_length=64),
            tokenizer=lambda: model.tokenizer,
            embedding_rows=lambda: None,
            cache=cache,
        )

    return text
