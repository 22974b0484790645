"""Whole tools side by side: checkpoints with weights of anybody's making, on the held-out text of a run's table.

    python -m experiments.end_to_end.run guided:3=RUN/checkpoint "AutoRound:3=multirun/end_to_end/auto_round-3/checkpoint"

A row is named NAME:BITS=CHECKPOINT, where BITS are those of the codes of the blocks' weights. `sequences.csv` keeps each row's KL
divergence on every sequence, so that a row that is there is not measured again; `results.csv` has the means, and how far each is
above the lowest of its bits, paired by sequence, with a standard error.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from evopress.errors import EvoPressError, first_line
from evopress.evaluation.heldout import Scores
from evopress.fitness.measures import HeldOut
from evopress.models.head import Head
from evopress.models.loading import has_weights, read_config
from evopress.models.opening import find_model
from evopress.progress import track
from evopress.reporting.differences import Difference
from evopress.workspace import Workspace
from experiments.composed import settings_of
from experiments.frames import write_frame
from experiments.scripts import existing, file_to_write, in_one_sentence

FOLDER = Path(__file__).parent
SEQUENCES = "sequences.csv"


class _Logits(Head):
    """No projection, for what is logits already."""

    def scores(self, hidden: Tensor) -> Tensor:
        """Return them as they are."""
        return hidden


def measured(dense: PreTrainedModel, other: PreTrainedModel, sequences: Tensor) -> Scores:
    """Measure a model against the dense one as a run's table does.

    Args: sequences: token ids int64 [N, L].
    """
    measure, head, sums = HeldOut(), _Logits(torch.empty(0)), []
    with torch.inference_mode():
        for ids in track(list(sequences.unsqueeze(1)), "evaluating"):
            base, found = (model(input_ids=ids, use_cache=False).logits[0, :-1] for model in (dense, other))
            sums.append(measure(found, measure.reference(base, ids[0, 1:], head), head).sum(-1, dtype=torch.float64))
    return Scores.of(torch.stack(sums, dim=-1), sequences.shape[1] - 1)


def asked_rows(asked: Sequence[str]) -> Iterator[tuple[str, float, Path]]:
    """Yield name, bits and checkpoint of NAME:BITS=CHECKPOINT; raise EvoPressError for what is none."""
    for each in asked:
        told, _, path = each.partition("=")
        name, _, bits = told.rpartition(":")
        try:
            yield name, float(bits), existing(path)
        except ValueError:
            raise EvoPressError(f"{each} names no row: expected NAME:BITS=CHECKPOINT, such as ours:3=RUN/checkpoint") from None


def num_tokens(checkpoint: Path) -> int:
    """Return how many tokens a checkpoint's model knows; raise EvoPressError if the folder holds no model that can be loaded."""
    read_config(checkpoint)
    if not has_weights(checkpoint):
        raise EvoPressError(f"{checkpoint} has no weights: name the folder of a whole checkpoint")
    try:
        return int(AutoConfig.from_pretrained(checkpoint).get_text_config().vocab_size)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise EvoPressError(f"{checkpoint} is no checkpoint of a language model that is known here: {first_line(error)}") from error


def check_tokens(checkpoints: Sequence[Path], dense: Path) -> None:
    """Raise EvoPressError as `num_tokens`, or if a checkpoint knows other tokens than the dense model's, whose text it is given."""
    expected = num_tokens(dense)
    for checkpoint in checkpoints:
        if (here := num_tokens(checkpoint)) != expected:
            raise EvoPressError(f"{checkpoint} knows {here} tokens, {dense.name} {expected}: name a checkpoint of that model")


def _column(name: str, bits: float) -> str:
    """Return where a row is in the file of sequences."""
    return f"{name}:{bits:g}"


def with_differences(rows: Sequence[Mapping[str, Any]], by_sequence: pd.DataFrame) -> pd.DataFrame:
    """Return the rows with how far their KL divergence is above the lowest of their bits, by sequence."""
    found = []
    for row in rows:
        lowest = min((other for other in rows if other["bits"] == row["bits"]), key=itemgetter("kl"))
        one, other = (by_sequence[_column(each["row"], each["bits"])].tolist() for each in (row, lowest))
        difference = Difference.of_sequences(one, other)
        found.append({**row, "above_lowest": difference.mean, "standard_error": difference.standard_error})
    return pd.DataFrame(found)


@in_one_sentence()
def main() -> None:
    """Measure what is not yet in the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", metavar="NAME:BITS=CHECKPOINT")
    parser.add_argument("--results", type=file_to_write, default=FOLDER / "results.csv", help=f"{SEQUENCES} goes beside it")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    wanted = list(asked_rows(asked.rows))
    torch.set_num_threads(asked.threads)
    rows: list[dict[Any, Any]] = pd.read_csv(asked.results).to_dict("records") if asked.results.exists() else []
    beside = asked.results.with_name(SEQUENCES)
    by_sequence = pd.read_csv(beside) if beside.exists() else pd.DataFrame()
    known = {(row["row"], row["bits"]) for row in rows}
    left = [(name, bits, checkpoint) for name, bits, checkpoint in wanted if (name, bits) not in known]
    workspace = Workspace(settings_of(["+method=quant", "bits=3"]), asked.results.parent)
    folder = find_model(workspace.settings.model, workspace.cache)
    check_tokens([checkpoint for _, _, checkpoint in left], folder)
    sequences = next(iter(workspace.evaluation_data.values()))
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, bits, checkpoint in left:
        scores = measured(dense, AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), sequences)
        by_sequence[_column(name, bits)] = scores.by_sequence["kl"]
        rows.append({"row": name, "bits": bits, "perplexity": scores.perplexity, **scores.means()})
        write_frame(beside, by_sequence)
        write_frame(asked.results, with_differences(rows, by_sequence))
    print(with_differences(rows, by_sequence).to_string(index=False, float_format="%.4g"))


if __name__ == "__main__":
    main()
