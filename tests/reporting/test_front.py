"""The figure of a front: labels that can be read, also where budgets are near."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from evopress.reporting import drawing, front


def a_row(budget: str, size: float, kl: float) -> dict[str, Any]:
    return {"name": f"evopress@{budget}", "budget": budget, "bytes": size, "kl": kl, "perplexity": {"docs": 9 + kl}}


def shown_labels(panel: Any) -> list[Any]:
    return [text for text in panel.texts if text.get_visible()]


@pytest.mark.parametrize("kept", [None, {"max_kl": 0.03, "answer": "2.4375", "tried": []}])
def test_labels_do_not_print_over_each_other(kept: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(front, "save", lambda figure, *rest: (seen.append(figure), drawing.save(figure, *rest))[1])
    near = [a_row(budget, 1e6 * float(budget), 0.1 / float(budget)) for budget in ("2.4", "2.4375", "2.45", "2.46", "2.5", "4")]
    others = [{"name": f"a_baseline_of_a_long_name_{index}", "bytes": 3e6 + index, "kl": 0.1} for index in range(12)]
    front.front_figure([*near, *others], near, tmp_path, measure="bits per weight", kept=kept)
    for panel in seen[0].axes[:2]:
        boxes = [label.get_window_extent() for label in shown_labels(panel)]
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
        named = {label.get_text() for label in shown_labels(panel)}
        assert named >= {"4", kept["answer"] if kept else "2.4"} and len(named) < len(near)
    legend = seen[0].legends[0].get_window_extent()
    assert legend.x0 >= 0 and legend.x1 <= seen[0].bbox.x1


def test_labels_that_are_far_apart_are_all_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(front, "save", lambda figure, *rest: (seen.append(figure), drawing.save(figure, *rest))[1])
    far = [a_row(budget, 1e6 * float(budget), 0.1 / float(budget)) for budget in ("2", "3", "4")]
    front.front_figure(far, far, tmp_path, measure="bits per weight")
    assert [label.get_text() for label in shown_labels(seen[0].axes[0])] == ["2", "3", "4"]


def test_the_tokens_of_a_search_are_in_one_column(tmp_path: Path) -> None:
    row = {**a_row("2.5", 1e6, 0.1), "tokens_spent": 512, "spent": {"tokens": 512, "seconds": 1.5, "evaluations": 4}}
    front.write_front([row], tmp_path / "front.csv")
    assert (tmp_path / "front.csv").read_text().splitlines() == [
        "budget,size MB if packed,held-out KL,ppl docs,search tokens,search seconds,search evaluations,genome",
        "2.5,1.0,0.1,9.1,512,1.5,4,points/2.5/genome.json",
    ]
