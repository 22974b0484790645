"""The baseline of experts: those that fewest tokens of calibration text are sent to are dropped."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evopress.baselines.baseline import EXPERTS, Baseline, Pass, Planned, Problem, check_importance, remembered
from evopress.data.tokens import tokens_digest
from evopress.models.blocks import BlockModel
from evopress.models.experts import tokens_of
from evopress.models.routing import expert_layer
from evopress.progress import track
from evopress.search.constraint import Spending
from evopress.settings import RunSettings
from evopress.units import Genome


@dataclass(frozen=True)
class LeastRouted(Baseline):
    """Drops experts in the order of how many tokens they see in the dense model, as far as the budget and its limits allow."""

    tokens: int
    """Calibration tokens that are counted."""
    serves = (EXPERTS,)

    def check(self, run: RunSettings) -> None:
        """See `Baseline`."""
        check_importance(run, self.tokens)

    def passes(self, plan: Planned) -> list[Pass]:
        """See `Baseline`."""
        return [Pass(1, self.tokens, alone=True)]

    def find(self, problem: Problem) -> dict[str, Genome]:
        """See `Baseline`."""
        text = problem.calibration_tokens
        text = text[: max(self.tokens // text.shape[1], 1)]

        def count() -> dict[str, int]:
            problem.spend(tokens=text.numel())
            return tokens_seen(problem.blocks, text, batch_tokens=problem.batch_tokens)

        seen = remembered(problem, problem.kept("routed", {"tokens": tokens_digest(text)}), "tokens", count)
        space, budget = problem.space, problem.budget
        spending = Spending(space, budget, [0] * len(space))
        parts = {limit.kind: place for place, limit in enumerate(budget.limits, 1) if limit.kind in budget.by_kind}
        for index in sorted(range(len(space)), key=lambda index: seen[space.units[index].name]):
            part = parts.get(space.units[index].group, 0)  # 0 is the whole
            if spending.left[part] < 0 and spending.can_move(index, 1) and spending.fits(spending.step(index, 1)):
                spending.move(index, 1)
        return {"least_routed": tuple(spending.levels)}


@torch.no_grad()
def tokens_seen(blocks: BlockModel, tokens: Tensor, *, batch_tokens: int = 4096) -> dict[str, int]:
    """Return how many tokens are sent to each expert, by its name, in one pass of the dense model over token ids int64 [N, L]."""
    seen: dict[str, Tensor] = {}
    layers = {index: layer for index, block in enumerate(blocks.blocks) if (layer := expert_layer(block)) is not None}

    def counting(name: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[name] = seen.get(name, 0) + tokens_of(module, *args, **kwargs)

        return hook

    blocks.prepare(tokens.shape[1])  # not under the hooks
    batch = max(batch_tokens // tokens.shape[1], 1)
    with ExitStack() as hooked:
        for index, layer in layers.items():
            experts = blocks.blocks[index].get_submodule(layer.name)
            name = f"{blocks.block_name(index)}.{layer.name}"
            hooked.callback(experts.register_forward_pre_hook(counting(name), with_kwargs=True).remove)
        for start in track(range(0, len(tokens), batch), "counting the tokens of experts"):
            hidden = blocks.embed(tokens[start : start + batch])
            for index in range(max(layers, default=-1) + 1):
                with blocks.on_device(index):
                    hidden = blocks.run(index, hidden)
    return {f"{name}.{expert}": count for name, counts in seen.items() for expert, count in enumerate(counts.tolist())}
