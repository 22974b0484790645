"""Text against search: how texts are divided, which runs there are, and what the shares say of numbers whose cause is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest

from experiments.calibration import measure, texts
from experiments.guided.measure import KEYS


def test_parts_share_nothing_and_the_beginning_is_held_out() -> None:
    text = "\n\n".join(f"{i} " + "x" * 700 for i in range(60))
    held_out, seeds = texts.parts([text, text.replace("x", "y")])
    whole = [*held_out, *itertools.chain(*seeds)]
    assert len(set(whole)) == 40 and len("".join(whole)) == 2 * len("".join(texts.pieces(text)))
    assert len(held_out) == 10 and held_out[0].startswith("0 x") and held_out[5].startswith("0 y")
    assert [len(seed) for seed in seeds] == [10, 10, 10]


def test_a_run_looks_at_one_text_and_is_judged_on_all(tmp_path) -> None:
    made = list(measure.runs(measure.KINDS, measure.TARGETS, [0, 1, 2], tmp_path, ["threads=1"]))
    assert len(made) == 4 * 4 * 3 == len({run.folder for run in made})
    (run,) = measure.runs(["random"], [0.25], [1], tmp_path, ["threads=1"])
    assert f"data.search=[{tmp_path}/random-1.jsonl]" in run.arguments and run.arguments[-1] == "threads=1"
    assert sum("held-out" in each for each in run.arguments) == len(measure.HELD_OUT)


def results(kl) -> pd.DataFrame:
    """Return rows whose KL is a function of text, row and seed, and that drop what they are asked to."""
    rows = []
    for text, row, seed in itertools.product(("docs", "code", "exams", "random"), ("shortgpt", "evopress"), (0, 1, 2)):
        value = kl(text, row, seed)
        held_out = {f"kl_{kind}": value * (0.5 if kind == text else 1.0) for kind in measure.HELD_OUT}
        labels = dict(zip(KEYS, ("drop", text, 0.25, row, seed), strict=True))
        rows.append({**labels, **held_out, "dropped": "1 2" if row == "evopress" else f"1 {len(text)}"})
    return pd.DataFrame(rows)


def test_shares_find_the_cause() -> None:
    by_text = np.broadcast_to(np.arange(3.0)[:, None, None], (3, 2, 4))
    assert measure.shares(by_text) == pytest.approx({"text": 1, "method": 0, "both": 0, "seeds": 0})
    noise = np.array([1.0, -1.0, 1.0, -1.0])
    mixed = measure.shares(by_text[:2] + np.array([0.0, 1.0])[None, :, None] + 0.5 * noise)
    assert mixed == pytest.approx({"text": 1 / 3, "method": 1 / 3, "both": 0, "seeds": 1 / 3})
    assert math.isnan(measure.shares(np.ones((2, 2, 2)))["text"])


def test_the_table_says_what_search_and_text_are_worth() -> None:
    found = results(lambda text, row, seed: (2.0 if row == "shortgpt" else 1.5) * (2.0 if text == "random" else 1.0) + 0.01 * seed)
    lines = measure.question(found).splitlines()
    docs = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert docs[:2] == ["25%", "docs"] and docs[6:8] == ["1.005", "0.7550"]
    assert docs[8:] == ["-25% (better)", "+100% (worse)", "+299% (worse)"]
    assert docs[2:6] == ["84%", "16%", "0%", "0%"]
    dropped = [cell.strip() for cell in measure.patterns(found).splitlines()[2].strip("|").split("|")]
    assert dropped == ["25%", "2", "1.00", "0.56", "0.33", "1.00", "1.00"]
    assert "**25% dropped**" in measure.render(found)
