"""Rank correlation of predicted with measured KL: which genomes it is of, and what noise does to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evopress.units import Budget, Level, Space, Unit
from experiments.guided import ranks as script
from experiments.guided.ranks import around, ranks


def test_genomes_around_one_are_others_within_its_budget() -> None:
    levels = tuple(Level(f"{bits} bits", bits, str(bits), bits, "quant") for bits in (4, 3, 2))
    space = Space("quant", tuple(Unit(f"u{i}", i, "q", 1, levels) for i in range(12)))
    budget, genome = Budget(36, 3.0, "bits per weight"), (1,) * 12
    found = around(space, budget, genome, count=30, switches=3, seed=0)
    changes = [sum(a != b for a, b in zip(genome, other, strict=True)) for other in found]
    assert len(set(found)) == 30 and all(budget.met_by(space, other) for other in found)
    assert 2 == min(changes) < max(changes) <= 6
    assert found == around(space, budget, genome, count=30, switches=3, seed=0)


@pytest.mark.parametrize("noise", [0.01, 1.0])
def test_a_perfect_predictor_reaches_the_ceiling(noise) -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(size=1000)
    kl = true[:, None] + 4 * noise * rng.normal(size=(1000, 16))
    perfect, opposite = ranks(kl, {"perfect": true, "opposite": -true})
    assert perfect["spearman"] == pytest.approx(perfect["ceiling"], abs=0.08) and opposite["spearman"] == -perfect["spearman"]
    assert (perfect["ceiling"] > 0.99) is (noise < 0.1)


def test_a_run_that_fails_takes_no_measured_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    results = tmp_path / "ranks.csv"
    told = {"predictor": "search", "spearman": 0.5}

    def rows(arguments: Any, target: float) -> Iterator[dict[str, Any]]:
        about = {"method": arguments.method, "target": target, "seed": arguments.seed}
        yield about | ({"failed": "no such setting"} if target == 3.0 and arguments.further else told)

    monkeypatch.setattr(script, "rows", rows)
    for further, code in (((), None), (("--", "misspelt=1"), 1)):
        monkeypatch.setattr("sys.argv", ["ranks", "--targets", "2.5", "3", "--results", str(results), *further])
        if code is None:
            script.main()
            before = results.read_bytes()
        else:
            with pytest.raises(SystemExit) as stop:
                script.main()
            assert stop.value.code == code and "runs of 3 failed" in capsys.readouterr().err
    assert results.read_bytes() == before and len(before.splitlines()) == 3
