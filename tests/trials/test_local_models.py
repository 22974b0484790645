"""Sequence length and group size of a model that nobody made a YAML for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from evopress.errors import EvoPressError
from evopress.models.opening import fitted
from evopress.settings import DropSettings, ModelSettings, PathsSettings, QuantSettings, RunSettings


def settings_for(folder: Path, *, hidden: int, inner: int, positions: Any = 2048, **changes: Any) -> RunSettings:
    """Write the shapes of a Llama's block, and return the settings of a run on it that leaves everything to the model."""
    folder.mkdir()
    config = {"model_type": "llama", "max_position_embeddings": positions}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    names = {f"self_attn.{part}_proj": hidden for part in "qkvo"} | {"mlp.up_proj": hidden, "mlp.gate_proj": hidden}
    shapes = {f"model.layers.0.{name}.weight": width for name, width in (names | {"mlp.down_proj": inner}).items()}
    tensors = {name: torch.zeros(1, width, dtype=torch.float16) for name, width in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return RunSettings(
        model=ModelSettings(path=str(folder), **({"sequence_length": "auto", "group_size": "auto"} | changes)),
        method=QuantSettings(group_size=changes.get("group_size", "auto")),
        paths=PathsSettings(cache=str(folder.parent / "cache")),
    )


@pytest.mark.parametrize(
    ("hidden", "inner", "group_size"),
    [
        (4096, 14336, 128),
        (576, 1536, 96),
        (1152, 6912, 128),
        (896, 4864, 128),
        (960, 2560, 80),
        (100, 300, 100),
        (1000, 2728, None),
    ],
)
def test_the_group_size_is_the_greatest_that_fits_every_unit(
    hidden: int, inner: int, group_size: int | None, tmp_path: Path
) -> None:
    found = fitted(settings_for(tmp_path / "model", hidden=hidden, inner=inner))
    assert (found.model.group_size, found.method.group_size) == (group_size, group_size)
    assert group_size is None or hidden % group_size == inner % group_size == 0


@pytest.mark.parametrize(("positions", "length"), [(131072, 4096), (4096, 4096), (2048, 2048), (512, 512), (None, 4096)])
def test_the_sequence_length_is_what_the_model_has_positions_for(positions: Any, length: int, tmp_path: Path) -> None:
    assert fitted(settings_for(tmp_path / "model", hidden=64, inner=128, positions=positions)).model.sequence_length == length


def test_what_is_given_is_taken(tmp_path: Path) -> None:
    given = settings_for(tmp_path / "model", hidden=64, inner=128, sequence_length=100, group_size=32)
    assert fitted(given) is given  # nothing is even looked for
    part = settings_for(tmp_path / "other", hidden=64, inner=128, group_size=None)
    found = fitted(part)
    assert (found.model.sequence_length, found.model.group_size, found.method.group_size) == (2048, None, None)


def test_other_methods_have_no_groups(tmp_path: Path) -> None:
    given = settings_for(tmp_path / "model", hidden=64, inner=128)
    given.method = DropSettings()
    found = fitted(given)
    assert found.method == DropSettings() and found.model.sequence_length == 2048


@pytest.mark.parametrize("key", ["sequence_length", "group_size"])
@pytest.mark.parametrize("value", ["many", 64.5, True])
def test_what_is_no_number_is_refused(key: str, value: Any) -> None:
    with pytest.raises(EvoPressError, match=rf"model\.{key}={value} is no whole number: expected one, .*auto"):
        ModelSettings(**{key: value})
