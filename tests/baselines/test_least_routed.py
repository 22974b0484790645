"""Experts that fewest tokens are sent to: how they are counted, and which are dropped."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from evopress.baselines.least_routed import LeastRouted, tokens_seen
from evopress.methods.drop import Drop
from evopress.models.blocks import BlockModel
from evopress.models.experts import together
from evopress.models.outline import outlined
from evopress.settings import DropSettings
from experiments.tiny_any import any_model

IDS = torch.arange(96).reshape(4, 24) * 7919 % 257


def counted_plainly(blocks: BlockModel, model_type: str) -> dict[str, int]:
    """How often the routers choose each expert in the model's own forward."""
    counts: dict[str, int] = {}

    def hook(name: str) -> Any:
        def forward(module: Any, args: Any, output: Any) -> None:
            chosen = output[2] if model_type != "llama4_text" else output[1].topk(module.top_k).indices
            for expert in range(4):
                counts[f"{name}.{expert}"] = counts.get(f"{name}.{expert}", 0) + int((chosen == expert).sum())

        return forward

    routers = [each for each in blocks.model.named_modules() if type(each[1]).__name__.endswith("Router")]
    handles = [module.register_forward_hook(hook(f"{name.rpartition('.')[0]}.experts")) for name, module in routers]
    with torch.no_grad(), together(blocks.model):
        blocks.model(input_ids=IDS)
    for handle in handles:
        handle.remove()
    return counts


@pytest.mark.parametrize("model_type", ["olmoe", "llama4_text"])
def test_the_tokens_of_experts_are_those_that_routers_send_there(model_type: str) -> None:
    model = any_model(model_type, num_hidden_layers=2)
    blocks = BlockModel(model, outlined(model))
    expected = counted_plainly(blocks, model_type)
    assert len(expected) == 8 and len(set(expected.values())) > 2
    assert tokens_seen(blocks, IDS, batch_tokens=50) == expected


@pytest.mark.parametrize("balanced", [True, False])
def test_the_least_routed_go_as_far_as_every_block_allows(balanced: bool) -> None:
    model = any_model("olmoe", num_hidden_layers=2)
    blocks = BlockModel(model, outlined(model))
    method = Drop(DropSettings(granularity="expert", balanced=balanced), sparsity=0.25, exchange="fit")
    space = method.space(blocks.shapes(), dtype_bits=32).priced(method.currency)
    counts = [9, 5, 6, 7, 1, 2, 3, 4]  # of the second block all are below the first's
    kept: Any = {"tokens": {unit.name: count for unit, count in zip(space.units, counts, strict=True)}}
    problem: Any = SimpleNamespace(
        space=space, budget=method.budget(space), calibration_tokens=IDS, kept=lambda *about: kept, spend=lambda **spent: None
    )
    found = LeastRouted(48).find(problem)["least_routed"]
    assert found == ((0, 1, 0, 0, 1, 0, 0, 0) if balanced else (0, 0, 0, 0, 1, 1, 0, 0))
