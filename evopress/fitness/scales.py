"""Scales of a found model's quantized weights, learned together: the KL divergence to the dense model goes down their gradient.

Codes and zeros stay, so the model takes the bytes that it took. Source: the second phase of EfficientQAT (arXiv:2407.11062), which
trains step sizes alone, end to end, by the text's likelihood; here it is the KL divergence, the measure of the search, on its text:
what weights were fitted to is a text that they know better than any other.

Every scale has a factor; Adam walks along the factors' logarithms, at a rate that falls to 0 in a line. The model goes forward and
back block by block, so that one block is on the device at a time.

Shapes: N sequences of L tokens, d hidden size.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from evopress.errors import EvoPressError
from evopress.files import canonical_json, write_atomically
from evopress.fitness.backward import BackwardPass, Entry
from evopress.fitness.measures import KLDivergence
from evopress.levels.live import LiveModel
from evopress.levels.scaled import ScaledLevels
from evopress.levels.store import save_tensors
from evopress.models.blocks import BlockModel
from evopress.progress import track
from evopress.ranks import InPairs, on_all_ranks, on_rank_zero, shares, sum_over_ranks, sums_held

logger = logging.getLogger(__name__)
STEP_TOKENS = 2048
"""Tokens of a step, at least a sequence."""
_ADAM = ("exp_avg", "exp_avg_sq")
_DIGEST = "sha256"
_SECONDS = 60.0
"""Between two times that the way so far is written down."""


def written_bytes(num_scales: int) -> int:
    """Return the bytes of the way so far on disk, at most: it is there twice while it is replaced."""
    return 2 * num_scales * 4 * (1 + len(_ADAM))


def held_bytes(num_scales: int) -> int:
    """Return the bytes that learning holds in host memory: logarithms, what Adam keeps, and gradients.

    Those of a share of text are made weight by weight, and put into one row; rows of several shares wait to be added up.
    """
    return num_scales * 4 * (2 + len(_ADAM) + sums_held())


@dataclass(frozen=True)
class Learning:
    """How scales are learned."""

    epochs: int
    """Times that the text is gone through."""
    rate: float
    """Of Adam, on logarithms, at the beginning: about the share by which a step changes a scale."""

    def steps(self, num_sequences: int, length: int) -> list[Tensor]:
        """Return the sequences of each step: all of them in an order of its own in each epoch, the same in every run."""
        together = max(STEP_TOKENS // length, 1)
        orders = (torch.randperm(num_sequences, generator=torch.Generator().manual_seed(epoch)) for epoch in range(self.epochs))
        return [step for order in orders for step in order.split(together)]


class ScaleLearner:
    """Walks down the gradient; of several processes each has its share of a step's sequences."""

    def __init__(
        self,
        blocks: BlockModel,
        levels: ScaledLevels,
        ids: Tensor,
        base: Tensor,
        learning: Learning,
        *,
        max_tokens_in_flight: int = 4096,
        chunk_tokens: int = 256,
    ) -> None:
        """Take the text.

        Args:
            levels: their factors are changed.
            ids: token ids int64 [N, L].
            base: the dense model's last hidden states [N, L, d].
        """
        self.levels, self.ids, self.base = levels, ids, base
        self.live = LiveModel(blocks, levels, cache_bytes=0)  # what is decoded is another weight after each step
        self.slots = {name: slot for part in range(len(blocks.blocks)) for name, slot in blocks.slots(part).items()}
        self.max_tokens_in_flight, self.chunk_tokens = max_tokens_in_flight, chunk_tokens
        self.learning, self.steps = learning, learning.steps(*ids.shape)
        self.optimizer = torch.optim.Adam(list(levels.logarithms.values()), lr=learning.rate, betas=(0.9, 0.95), eps=1e-12)

    def learn(self, state: Path) -> None:
        """Go through all steps, or those that are left.

        Args: state: where the way so far is written down; what is there of the same way is gone on with.

        Raises: EvoPressError if a gradient is not finite.
        """
        begun, self._written = self._gone_on_with(state), time.monotonic()
        for number in track(range(len(self.steps)), "learning scales"):
            if number < begun:
                continue
            self.step(number)
            on_rank_zero(partial(self._write_now_and_then, state, number + 1))

    def step(self, number: int) -> None:
        """Take one step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning.rate * (1.0 - number / len(self.steps))
        for logarithms, gradient in zip(self.levels.logarithms.values(), self.gradients(self.steps[number]), strict=True):
            logarithms.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradients(self, rows: Tensor) -> list[Tensor]:
        """Return the gradients of the mean KL divergence of some sequences with respect to all logarithms, float32 [R, G] each.

        Raises: EvoPressError if one is not finite.
        """
        added = InPairs[Tensor](torch.Tensor.add_)

        def walk() -> None:
            for each in shares(len(rows)):
                added.add(self._of_share(rows[each.start : each.stop]))

        on_all_ranks(walk)
        together = sum_over_ranks(added.total)
        if not bool(torch.isfinite(together).all()):
            raise EvoPressError(
                "a gradient of the scales is not finite: look at the model's outputs at these levels, or set refine.scale_epochs=0"
            )
        together /= len(rows) * (self.ids.shape[1] - 1)
        parts = together.split([logarithms.numel() for logarithms in self.levels.logarithms.values()])
        return [part.view_as(logarithms) for part, logarithms in zip(parts, self.levels.logarithms.values(), strict=True)]

    def _of_share(self, rows: Tensor) -> Tensor:
        """Return the gradients of the summed KL divergence of some sequences, or of none, all in one row, float32."""
        found = {name: torch.zeros_like(logarithms) for name, logarithms in self.levels.logarithms.items()}

        def see(name: str, entry: Entry) -> None:
            if name in found:
                found[name] += self.levels.gradient(name, self.slots[name].weight, entry.of_weight()).cpu()

        if len(rows):
            BackwardPass(
                self.live,
                (0,) * len(self.levels.space),
                self.ids[rows],
                self.base[rows.to(self.base.device)],
                KLDivergence(),
                see=see,
                max_tokens_in_flight=self.max_tokens_in_flight,
                chunk_tokens=self.chunk_tokens,
            ).run()
        return torch.cat([gradient.flatten() for gradient in found.values()])

    @property
    def _way(self) -> int:
        """What a way is known by: the weights that it began with, and its steps; their text is that of the folder."""
        files = [entry["sha256"] for entry in self.levels.database.manifest["files"]]
        told = canonical_json({"files": files, "steps": len(self.steps), "rate": self.learning.rate})
        return int.from_bytes(hashlib.sha256(told.encode()).digest()[:7], "big")

    def _write_now_and_then(self, state: Path, done: int) -> None:
        if time.monotonic() - self._written < _SECONDS:
            return
        found = {"way": torch.tensor([self._way, done])}
        for name, logarithms in self.levels.logarithms.items():
            adam = self.optimizer.state[logarithms]
            found |= {f"{name}/{part}": adam[part] for part in _ADAM} | {f"{name}/logarithms": logarithms}
        found[_DIGEST] = _digest_of(found)
        write_atomically(state, lambda path: save_tensors(found, path))
        self._written = time.monotonic()

    def _gone_on_with(self, state: Path) -> int:
        """Take the way so far from its file, if there is one, and return the steps that are done."""

        def read() -> dict[str, Tensor] | None:
            try:
                found = load_file(state)
                if torch.equal(found.pop(_DIGEST), _digest_of(found)):
                    return found if found["way"][0] == self._way else None
            except FileNotFoundError:
                return None
            except (OSError, SafetensorError, KeyError):
                pass
            logger.warning("%s is damaged: scales are learned from the beginning", state)
            return None

        if (found := on_rank_zero(read)) is None:
            return 0
        done, adam = int(found["way"][1]), self.optimizer.state_dict()
        for number, (name, logarithms) in enumerate(self.levels.logarithms.items()):
            logarithms.copy_(found[f"{name}/logarithms"])
            adam["state"][number] = {"step": torch.tensor(float(done)), **{part: found[f"{name}/{part}"] for part in _ADAM}}
        self.optimizer.load_state_dict(adam)
        return done


def _digest_of(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the SHA-256 of tensors, uint8 [32]."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.numpy().data)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
