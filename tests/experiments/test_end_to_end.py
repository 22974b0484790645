"""Tools side by side: a checkpoint is measured as a run measures its genome, and a row that is named wrongly is refused."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from torch import Tensor

from evopress.errors import EvoPressError
from evopress.evaluation.heldout import measure_held_out
from evopress.fitness.population import PopulationEvaluator
from evopress.levels.live import LiveModel
from experiments.end_to_end.run import asked_rows, check_tokens, measured, with_differences


def test_a_checkpoint_is_worth_what_a_run_says_of_the_genome_in_it(
    live_model: Callable[..., LiveModel], tokens: Callable[..., Tensor]
) -> None:
    live, sequences = live_model("llama"), tokens(5, 24, seed=3)
    genome = (2,) * len(live.space)
    (expected,) = measure_held_out(PopulationEvaluator(live), [genome], sequences)
    with live.applied(genome):
        other = copy.deepcopy(live.blocks.model)
    found = measured(live.blocks.model, other, sequences)
    assert found.num_tokens == expected.num_tokens and found.kl > 0
    assert found.by_sequence["kl"] == pytest.approx(expected.by_sequence["kl"], rel=1e-4, abs=1e-6)
    assert (found.perplexity, found.acceptance_rate) == pytest.approx((expected.perplexity, expected.acceptance_rate), rel=1e-4)


def test_rows_are_named_with_their_bits(tmp_path: Path) -> None:
    (row,) = asked_rows([f"a tool: its best:2.5={tmp_path}"])
    assert row == ("a tool: its best", 2.5, tmp_path)
    for wrong in (f"tool={tmp_path}", f"tool:few={tmp_path}"):
        with pytest.raises(EvoPressError, match="names no row: expected NAME:BITS=CHECKPOINT"):
            list(asked_rows([wrong]))
    with pytest.raises(EvoPressError, match="no file or folder"):
        list(asked_rows(["tool:3=nowhere"]))


def test_a_folder_without_a_model_and_one_of_other_tokens_are_refused(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    dense, other = tiny_folder("llama"), Path(shutil.copytree(tiny_folder("llama"), tmp_path / "other"))
    check_tokens([dense, other], dense)
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": 7}))
    with pytest.raises(
        EvoPressError, match=f"other knows 7 tokens, {dense.name} {config['vocab_size']}: name a checkpoint of that"
    ):
        check_tokens([dense, other], dense)
    (other / "config.json").write_text("{}")
    with pytest.raises(EvoPressError, match="other is no checkpoint of a language model that is known here: "):
        check_tokens([other], dense)
    (other / "model.safetensors").unlink()
    with pytest.raises(EvoPressError, match="other has no weights"):
        check_tokens([other], dense)
    (other / "config.json").unlink()
    with pytest.raises(EvoPressError, match=r"other has no config\.json: give the folder of a Hugging Face checkpoint"):
        check_tokens([other], dense)


def test_differences_are_to_the_lowest_row_of_the_same_bits() -> None:
    named = (("tool", 3.0, 0.4), ("ours", 3.0, 0.2), ("tool", 4.0, 0.07))
    rows = [{"row": name, "bits": bits, "kl": kl} for name, bits, kl in named]
    by_sequence = pd.DataFrame({"ours:3": [0.1, 0.2, 0.3], "tool:3": [0.2, 0.4, 0.6], "tool:4": [0.0, 0.1, 0.1]})
    found = with_differences(rows, by_sequence)
    assert found.above_lowest.tolist() == pytest.approx([0.2, 0, 0])
    assert found.standard_error.tolist() == pytest.approx([0.1 / 3**0.5, 0, 0])
