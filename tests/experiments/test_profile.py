"""What found genomes spend by projection and by block, and what is said of the paper's statements: on made-up and on tiny runs."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from in_process import invoke

from evopress.errors import EvoPressError
from evopress.units import Level, Space, Unit
from experiments.profile import run
from experiments.profile.statements import STATEMENTS, Profile


def bits(*blocks: float, v_proj: float = 3.0) -> Profile:
    return Profile(2.5, {"q_proj": 2.0, "v_proj": v_proj}, blocks)


def verdicts(method: str, profiles: dict[str, Profile]) -> list[str]:
    return [statement.verdict(profiles) for statement in STATEMENTS if statement.method == method]


def test_a_genome_is_averaged_by_kind_and_block() -> None:
    levels = {size: tuple(Level(f"{b} bits", b * size, str(b), b * size, "quant") for b in (4, 2)) for size in (10, 30)}
    units = [Unit(f"{i}.{kind}", i, kind, size, levels[size]) for i in (0, 1) for kind, size in (("v_proj", 10), ("up_proj", 30))]
    found = run.profile_of(Space("quant", tuple(units)), (0, 1, 1, 0))
    assert found == Profile(3.0, {"v_proj": 3.0, "up_proj": 3.0}, [2.5, 3.5])
    with pytest.raises(EvoPressError, match="at least two blocks that have units, and this model has 1"):
        run.profile_of(Space("quant", tuple(units[:2])), (0, 1))


def test_verdicts_on_bits() -> None:
    """In the order of the statements: first block most, and more; second, last and last but one less; v_proj."""
    papers = {"0": bits(2.0, 3.0, 2.4, 3.1, 2.9), "1": bits(2.1, 2.9, 2.3, 2.8, 2.8, v_proj=3.1)}
    assert verdicts("quant", papers) == ["holds"] * 6
    turned = {"0": bits(3.0, 2.0, 2.4, 2.2, 2.1, v_proj=2.0), "1": bits(2.9, 2.1, 2.3, 2.3, 2.2, v_proj=2.1)}
    assert verdicts("quant", turned) == ["does not hold"] * 6
    unlike = {"0": bits(2.0, 3.0, 2.4, 3.1, 2.9), "1": bits(3.0, 2.0, 2.4, 1.9, 2.1, v_proj=2.0)}
    assert verdicts("quant", unlike)[1:] == ["a tie"] * 5
    assert set(verdicts("quant", {"0": papers["0"]})) == {"holds, one seed"}
    assert set(verdicts("quant", {"0": papers["0"], "1": papers["0"]})) == {"holds, alike on all seeds"}
    assert set(verdicts("quant", {"0": turned["0"], "1": turned["0"]})) == {"does not hold, alike on all seeds"}
    for profiles, count in ((papers, 2), (turned, 0), (unlike, 1)):
        assert {each.num_holding(profiles) for each in STATEMENTS if each.method == "quant"} == {count}
    same = bits(2.5, 2.5, 2.5, v_proj=2.5)
    assert not any(each.num_holding({"0": same}) for each in STATEMENTS if each.method == "quant"), "equal is not less"


def test_verdicts_on_sparsity_turn_the_sign() -> None:
    """Less compressed is a lower number there."""
    blocks = (0.5, 0.6, 0.7, 0.7, 0.9, 0.8, 0.6, 0.6)
    papers = {
        "0": Profile(0.7, {"q_proj": 0.8, "v_proj": 0.4}, blocks),
        "1": Profile(0.7, {"q_proj": 0.75, "v_proj": 0.45}, [value + 0.01 * i for i, value in enumerate(blocks)]),
    }
    assert verdicts("sparsity", papers) == ["holds, alike on all seeds", *["holds"] * 5]
    turned = {
        seed: Profile(0.7, {k: 1.4 - v for k, v in p.kinds.items()}, [1.4 - b for b in p.blocks]) for seed, p in papers.items()
    }
    assert verdicts("sparsity", turned) == ["does not hold, alike on all seeds", *["does not hold"] * 5]


def test_parts_of_the_depth_have_a_block_at_least() -> None:
    profile = bits(*range(30))
    assert profile.part(0, 1 / 8) == 1 and profile.part(1 / 2, 5 / 8) == 16 and profile.part(3 / 4, 1) == 25.5
    assert bits(1, 2).part(0, 1 / 8) == 1 and bits(1, 2).part(3 / 4, 1) == 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two searches of bit widths, two seeds of one of them, and one of sparsity, on the tiny model."""
    home = tmp_path_factory.mktemp("profile")
    for name, overrides in {
        "evolution-0": ["+method=quant", "bits=2.5", "search/strategy=evolution", "seed=0"],
        "evolution-1": ["+method=quant", "bits=2.5", "search/strategy=evolution", "seed=1"],
        "guided-0": ["+method=quant", "bits=2.5", "seed=0"],
        "sparse-0": ["+method=sparsity", "sparsity=0.5", "seed=0"],
    }.items():
        plain = ["+debug=tiny", "baselines.names=[]", "stages=[database,search]", f"hydra.run.dir={home / name}"]
        done = invoke(*overrides, *plain, f"paths.cache={home / 'cache'}", cache=home / "cache", cwd=home)
        assert done.code == 0, done.text[-3000:]
    return home


def test_runs_of_one_search_are_one_profile(runs: Path, tmp_path: Path) -> None:
    run.main([*(str(runs / name) for name in ("evolution-0", "evolution-1", "guided-0")), "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"results.csv", "table.md", "profile.png", "profile.svg"}
    with (tmp_path / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    evolution, guided = "evolution, 2.5 bits, best levels", "guided, 2.5 bits, best levels"
    assert {(row["found"], row["seeds"]) for row in rows} == {(evolution, "2"), (guided, "1")}
    blocks = [float(row["mean"]) for row in rows if row["found"] == evolution and row["of"] == "block"]
    assert sum(blocks) / len(blocks) == pytest.approx(next(float(row["mean"]) for row in rows if row["of"] == "all"))
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert (
        text.count(f"| {evolution} | F.3 |") == text.count(f"| {guided} | F.3 |") == 3
        and "| 1 of 1 seed | holds, one seed |" in text
    )
    (picture := tmp_path / "profile.png").write_bytes(b"")
    run.main(["--draw", "--out", str(tmp_path)])
    assert picture.stat().st_size > 10_000, "of results.csv alone"
    run.main([str(runs / "sparse-0"), "--out", str(tmp_path)])
    assert "guided, 50% sparsity, best levels" in (tmp_path / "table.md").read_text(encoding="utf-8")


def test_runs_or_results_are_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--out", str(tmp_path)])
    assert "name folders of finished runs, or give --draw" in capsys.readouterr().err
    with pytest.raises(EvoPressError, match=r"there is no file or folder .*results.csv"):
        run.main(["--draw", "--out", str(tmp_path)])


def test_what_cannot_be_averaged_together_is_refused(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(EvoPressError, match="several models or methods"):
        run.read_groups([runs / "evolution-0", runs / "sparse-0"])
    with pytest.raises(EvoPressError, match=r"seed 0 of evolution, 2.5 bits, best levels is there twice"):
        run.read_groups([runs / "evolution-0", runs / "evolution-0"])
    for name, text in {"finished.json": "{}", "genome.json": '{"schema": 1}', ".hydra/overrides.yaml": "['+method=drop']"}.items():
        (tmp_path / "drop" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "drop" / name).write_text(text)
    with pytest.raises(EvoPressError, match="is of method drop: the paper has profiles of quant and sparsity"):
        run.read_groups([tmp_path / "drop"])
    with pytest.raises(EvoPressError, match="is no finished run with a genome"):
        run.read_groups([tmp_path])
    (runs / "cache" / "levels").rename(runs / "cache" / "moved")
    try:
        with pytest.raises(
            EvoPressError, match=r"which is not in .*levels: its manifest says what the units are; set EVOPRESS_CACHE"
        ):
            run.read_groups([runs / "guided-0"])
    finally:
        (runs / "cache" / "moved").rename(runs / "cache" / "levels")
