"""Theorem 1 of the paper on the search itself; `experiments/theorem1` measures it on a larger grid."""

import numpy as np
import pytest

from experiments.theorem1.run import exact_ratio, fit_slope, generations_to_optimum, main, measure


@pytest.mark.parametrize(("n", "k", "num_offspring"), [(10, 1, 1), (12, 6, 4), (20, 5, 8)])
def test_the_search_reaches_the_optimum_of_a_linear_fitness(n, k, num_offspring):
    for seed in range(3):
        generations = generations_to_optimum(n, k, num_offspring, np.random.default_rng(seed))
        assert 0 <= generations <= 20 * k * (n - k)


@pytest.mark.parametrize(("n", "k"), [(8, 2), (12, 6)])
def test_one_offspring_takes_the_generations_that_can_be_computed(n, k):
    cell = measure(n, k, 1, num_seeds=300)
    assert cell.ratio == pytest.approx(exact_ratio(n, k), abs=4 * cell.standard_error / cell.bound)


@pytest.mark.slow
def test_generations_scale_linearly_with_k_n_minus_k_over_lambda():
    cells = [
        measure(n, n // share, num_offspring, num_seeds=24, seed=1)
        for n in (16, 32, 64)
        for share in (8, 2)
        for num_offspring in (1, 4)
    ]
    assert 0.8 < fit_slope(cells) < 1.2
    for num_offspring in (1, 4):
        assert 0.8 < fit_slope([cell for cell in cells if cell.num_offspring == num_offspring]) < 1.2
    assert max(cell.ratio for cell in cells) < 3


@pytest.mark.slow
def test_the_experiment_writes_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.theorem1.run.NUM_BITS", (8, 16))
    monkeypatch.setattr("sys.argv", ["run", "--seeds", "2", "--out", str(tmp_path)])
    main()
    assert {path.name for path in tmp_path.iterdir()} == {"results.csv", "table.md", "plot.png", "plot.svg"}
    assert len((tmp_path / "results.csv").read_text(encoding="utf-8").splitlines()) == 1 + 2 * 3 * 4
