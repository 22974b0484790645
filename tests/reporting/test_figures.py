"""Figures: files that are images with something on them, for any space and any part of a run."""

from __future__ import annotations

import itertools
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from evopress.currencies import CURRENCIES
from evopress.reporting import drawing, dropped, figures, held, lineage
from evopress.reporting.tables import significant
from evopress.units import Level, Space, Unit


def check(paths: list[Path], name: str) -> tuple[Any, str]:
    """Return the image and the SVG text after seeing that both hold a drawing."""
    assert [path.name for path in paths] == [f"{name}.png", f"{name}.svg"]
    image = imread(paths[0])
    assert min(image.shape[:2]) > 200
    assert 0.01 < (image[..., :3] < 0.99).any(axis=-1).mean() < 0.9  # neither blank nor filled
    svg = paths[1].read_text()
    assert svg.rstrip().endswith("</svg>")
    return image, svg


@pytest.fixture(autouse=True)
def warnings_are_errors() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def colours(image: Any) -> set[tuple[int, ...]]:
    """Return the red, green and blue of every colour that more than 500 pixels have."""
    red, green, blue = np.moveaxis((image[..., :3] * 255).round().astype(int), -1, 0)
    values = np.nonzero(np.bincount((red << 16 | green << 8 | blue).ravel()) > 500)[0].tolist()
    return {(value >> 16, value >> 8 & 255, value & 255) for value in values}


def odd_space() -> Space:
    """Blocks of different kinds, experts, many levels with labels of their own, a block index that is missing."""

    def unit(block: int, name: str, size: int) -> Unit:
        levels = tuple(Level(f"{100 - 7 * i - size}% kept", 100 - 7 * i, f"level {i}", 900) for i in range(9))
        return Unit(f"layers.{block}.{name}", block, name.rpartition(".")[2], size, levels)

    names = [(0, "attn.qkv", 1), (0, "mlp.up", 2), (1, "mamba.in", 3), (4, "attn.qkv", 1)]
    experts = [(4, f"experts.{index}.w1", 4) for index in range(3)]
    return Space("sparsity", tuple(unit(*each) for each in [*names, *experts]))


def test_convergence(run: Any, tmp_path: Path) -> None:
    image, _ = check(figures.convergence(run.records, tmp_path, run.baselines), "convergence")
    assert (0x00, 0x72, 0xB2) in colours(image)  # the held-out curve
    bare, _ = check(figures.convergence(run.records, tmp_path / "bare"), "convergence")
    assert (0xD5, 0x5E, 0x00) in colours(image) - colours(bare)  # a baseline's line


def test_baselines_are_lines_among_perplexities_too(run: Any, tmp_path: Path) -> None:
    seen = [value for record in run.records for value in (record.get("held_out") or {"perplexity": {}})["perplexity"].values()]
    least, most = min(seen), max(seen)
    drawn = {"dp": (least + most) / 2, "uniform_2": 9 * most}
    without, _ = check(figures.convergence(run.records, tmp_path), "convergence")
    image, svg = check(figures.convergence(run.records, tmp_path, perplexities=drawn), "convergence")
    assert (0xD5, 0x5E, 0x00) in colours(image) - colours(without)
    assert "DP, held-out -->" in svg and f"uniform 2: perplexity {significant(9 * most)}, off the scale -->" in svg


def is_inside(artist: Any, figure: Any) -> bool:
    """Tell whether all of a legend or a title is on the page; its layout has been done."""
    box = artist.get_window_extent()
    return bool(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1)


@pytest.mark.parametrize("count", [12, 0])
def test_legends_and_titles_are_whole(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    seen: list[Any] = []
    for module in (figures, lineage, dropped):
        monkeypatch.setattr(module, "save", lambda figure, *rest: (seen.append(figure), drawing.save(figure, *rest))[1])
    names = [f"shortened_llama_of_a_long_name_{index}" for index in range(count)]
    text = "the first 126 held-out tokens of " + "a_text_of_a_long_name_" * 6
    figures.convergence(run.records, tmp_path, {name: 50.0 + index for index, name in enumerate(names)}, text=text)
    figures.level_profile(run.space, dict.fromkeys([*names, "evopress"], run.genome), tmp_path)
    figures.level_heatmap(run.space.priced(CURRENCIES["read"]), run.genome, tmp_path)
    dropped.dropped_modules_figure({name: set() for name in [*names, "evopress"]}, 2, tmp_path)
    lineage.selection(run.records, tmp_path)
    assert len(seen) == 5
    for figure in seen:
        legends = [*figure.legends, *(axis.get_legend() for axis in figure.axes if axis.get_legend())]
        assert all(is_inside(artist, figure) for artist in [*legends, figure._suptitle])
    tall = [axis.get_window_extent().height / seen[0].dpi for axis in seen[0].axes]
    assert min(tall) > 1.5  # inches: the legend takes no room from the panels


def test_what_is_kept_whole_is_darkest(tmp_path: Path) -> None:
    bits = tuple(Level(f"{bits} bits", bits * 64, str(bits), bits * 64 + 8, "quant") for bits in (4, 2))
    keep, drop = Level("keep", 1, "keep", 32, "drop"), Level("drop", 0, "drop", 0, "drop")
    units = (Unit("layers.0.mlp.up", 0, "up_proj", 64, bits), Unit("layers.0.mlp", 0, "mlp", 64, (keep, drop)))
    space = Space("joint", units, CURRENCIES["bytes"], inside=(1, None))
    _, svg = check(figures.level_heatmap(space, (0, 0), tmp_path), "level_heatmap")
    shown = [part.split("-->")[0].strip() for part in svg.split("<!--")[1:]]
    assert [text for text in shown if text in ("keep", "4 bits", "2 bits", "drop")] == ["keep", "4 bits", "2 bits", "drop"]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_convergence_of_a_short_run(run: Any, tmp_path: Path, count: int) -> None:
    short = [{**record, "fitness": None, "held_out": None} for record in run.records[:count]]
    check(figures.convergence(short, tmp_path), "convergence")
    check(figures.convergence(run.records[:count], tmp_path, {"dp": 1.0, "broken": float("nan")}), "convergence")


def test_a_perplexity_search_has_no_empty_panels(run: Any, tmp_path: Path) -> None:
    records = [{**record, "held_out": None} for record in run.records[:4]]
    image, _ = check(figures.convergence(records, tmp_path, fitness="perplexity"), "convergence")
    assert image.shape[0] < image.shape[1] / 2  # one row of panels


def test_a_measure_of_another_package_has_panels_of_its_own(run: Any, tmp_path: Path) -> None:
    both, svg = check(figures.convergence(run.records, tmp_path, {"dp": 1.0}, fitness="reverse_kl"), "convergence")
    only, plain = check(figures.convergence(run.records, tmp_path, {"dp": 1.0}, fitness="topk_kl"), "convergence")
    assert "<!-- reverse_kl -->" in svg and "<!-- topk_kl -->" not in plain
    assert both.shape[0] > 1.2 * only.shape[0]


def test_heatmap_shows_each_level_in_its_colour(run: Any, tmp_path: Path) -> None:
    flat = run.space.uniform("3 bits")
    image, _ = check(figures.level_heatmap(run.space, run.genome, tmp_path), "level_heatmap")
    uniform, _ = check(figures.level_heatmap(run.space, flat, tmp_path / "flat"), "level_heatmap")
    assert len(colours(image)) >= len(set(run.genome)) + 1  # levels and the white card
    assert image.shape == uniform.shape
    assert not np.array_equal(image, uniform)


def test_heatmap_and_profile_of_an_odd_space(tmp_path: Path) -> None:
    space = odd_space()
    genome = tuple(range(len(space)))
    check(figures.level_heatmap(space, genome, tmp_path), "level_heatmap")
    check(figures.level_profile(space, {"evopress": genome}, tmp_path), "level_profile")


@pytest.mark.parametrize(("experts", "named"), [(8, 28), (96, 98)])
def test_names_of_rows_never_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experts: int, named: int) -> None:
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", *(k for k in ("gate_proj", "up_proj", "down_proj") for _ in range(experts))]
    levels = tuple(Level(f"{bits} bits", bits * 64, str(bits), bits * 64) for bits in (4, 2))
    space = Space("quant", tuple(Unit(f"layers.0.{i}.{kind}", 0, kind, 64, levels) for i, kind in enumerate(kinds)))
    drawn: list[Any] = []
    for module in (figures, held):
        monkeypatch.setattr(module, "save", lambda figure, *rest: (drawn.append(figure), figure.canvas.draw())[0])
    genome = (0,) * len(space)
    figures.level_heatmap(space, genome, tmp_path)
    asked = {"generation": 1, "genome": list(genome), "details": {"held": [0.5] * len(space)}}
    held.held_figure([{"generation": 0, "genome": list(genome)}, asked], space, tmp_path)
    for figure in drawn:
        labels = figure.axes[0].get_yticklabels()
        boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.y0)
        assert len(labels) == named and all(below.y1 <= above.y0 for below, above in itertools.pairwise(boxes))
        words = ", ".join(label.get_text() for label in labels)
        assert all(name in words for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj [0]", "up_proj [0]"))


def sparsity_space(blocks: int = 12, *, levels: int = 9) -> Space:
    """Units of two sizes whose levels are 400 weights apart around 70%."""

    def ladder(size: int) -> tuple[Level, ...]:
        kept = [round(0.3 * size) - i * 400 for i in range(-(levels // 2), levels - levels // 2)]
        return tuple(Level(f"{1 - count / size:.1%}", count, str(i), count) for i, count in enumerate(kept))

    return Space(
        "sparsity",
        tuple(
            Unit(f"layers.{block}.{kind}", block, kind, size, ladder(size))
            for block in range(blocks)
            for kind, size in (("q_proj", 20_000), ("v_proj", 10_000))
        ),
    )


def test_sparsity_is_what_is_not_kept(tmp_path: Path) -> None:
    space = sparsity_space()
    genome = tuple(0 if unit.kind == "v_proj" else 6 for unit in space.units)
    assert figures.measure_name(space) == "sparsity"
    by_kind = figures.averages(space, genome, by="kind")
    assert by_kind == {"q_proj": pytest.approx(0.74), "v_proj": pytest.approx(0.54)}
    uniform = (4,) * len(space)
    assert figures.averages(space, uniform, by="block") == {block: pytest.approx(0.7) for block in range(12)}
    _, svg = check(
        figures.level_profile(space, {"uniform": uniform, "owl": uniform, "evopress": genome}, tmp_path), "level_profile"
    )
    assert "<!-- sparsity -->" in svg
    assert "kept" not in svg


def test_many_labels_are_a_scale_of_colours(tmp_path: Path) -> None:
    space = sparsity_space()
    genome = tuple(0 if unit.kind == "v_proj" else 6 for unit in space.units)
    image, svg = check(figures.level_heatmap(space, genome, tmp_path), "level_heatmap")
    assert "<!-- 54 -->" in svg and "<!-- 74 -->" in svg  # annotated in percent, without decimals
    assert "in percent (67.33% on average)" in svg
    assert len([colour for colour in colours(image) if colour != (255, 255, 255)]) >= 2
    check(figures.level_heatmap(space, (4,) * len(space), tmp_path / "uniform"), "level_heatmap")  # no range of values
    few = sparsity_space(levels=3)
    _, svg = check(figures.level_heatmap(few, (1,) * len(few), tmp_path / "few"), "level_heatmap")
    assert "<!-- 70.0% -->" in svg  # a colour per label


def test_profile(run: Any, tmp_path: Path) -> None:
    image, _ = check(figures.level_profile(run.space, run.genomes, tmp_path), "level_profile")
    assert len(colours(image)) >= len(run.genomes) + 1


def test_averages(run: Any) -> None:
    uniform = run.genomes["uniform_3"]
    assert set(figures.averages(run.space, uniform, by="kind").values()) == {3.0}
    by_block = figures.averages(run.space, run.genome, by="block")
    assert list(by_block) == list(range(30))
    assert sum(by_block.values()) / 30 == pytest.approx(run.space.cost(run.genome) / run.space.size)


def test_a_genome_keeps_its_colour_in_every_figure() -> None:
    some = drawing.styles(["uniform_3", "dp", "evopress"])
    more = drawing.styles(["uniform_3", "uniform_2", "best_of_32", "dp", "owl", "evopress"])
    assert {name: more[name] for name in some} == some
    assert len(set(more.values())) == len(more)


def test_guided_and_evolution_look_alike_in_any_order() -> None:
    one = drawing.search_styles(["evolution, 2.5 bits", "guided, from dp, 2.5 bits"])
    other = drawing.search_styles(["guided, 70% sparsity", "evolution, 70% sparsity"])
    assert list(one.values()) == list(other.values())[::-1]
    many = drawing.search_styles(["evolution", "evolution from dp", "guided", "guided, then evolution", "dp"])
    assert (many["guided"], many["evolution"]) == tuple(other.values()) and len(set(many.values())) == 5
    assert len(drawing.search_styles(f"row {number}" for number in range(30))) == 30


def test_the_same_data_give_the_same_files(run: Any, tmp_path: Path) -> None:
    first = figures.level_heatmap(run.space, run.genome, tmp_path / "a")
    second = figures.level_heatmap(run.space, run.genome, tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_pyplot_stays_out_of_it(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    figures.level_profile(run.space, run.genomes, tmp_path)


def test_head_and_embedding_are_named_and_are_no_blocks(tmp_path: Path) -> None:
    def unit(name: str, block: int, kind: str) -> Unit:
        return Unit(name, block, kind, 64, tuple(Level(f"{bits} bits", bits * 64, str(bits), bits * 64) for bits in (4, 2)))

    blocks = [unit(f"layers.{block}.{kind}", block, kind) for block in range(2) for kind in ("q_proj", "up_proj")]
    space = Space("quant", (*blocks, unit("lm_head", 2, "head"), unit("embed_tokens", 3, "embedding")))
    genomes = [(0, 1, 0, 1, 0, 1), (0, 1, 0, 1, 1, 0), (0, 1, 1, 0, 1, 0)]
    records = [{"generation": i, "genome": list(genome), "switches": []} for i, genome in enumerate(genomes)]
    records[1]["switches"] = [[4, 0, 1], [5, 1, 0]]

    def texts(svg: str) -> list[str]:
        return [part.split("-->")[0].strip() for part in svg.split("<!--")[1:]]

    shown = texts(check(figures.level_heatmap(space, genomes[0], tmp_path), "level_heatmap")[1])
    assert [text for text in shown if text in ("head", "embedding", "2", "3")] == ["head", "embedding", *["2"] * 3]  # levels: no 3
    shown = texts(check(figures.level_profile(space, {"evopress": genomes[0]}, tmp_path), "level_profile")[1])
    assert {"head", "embedding"} <= set(shown) and shown.count("1") and "3" not in shown[shown.index("by kind of unit") :]
    shown = texts(check(lineage.lineage(records, space, tmp_path), "lineage")[1])
    assert shown.index("1") < shown.index("head") < shown.index("embedding")
    shown = texts(check(lineage.switches(records, space, tmp_path), "switches")[1])
    assert {"0 q_proj", "head", "embedding"} <= set(shown)
