"""The benchmark: its plain ways against the fast ones and the literal references, its count of operations, what it writes."""

from __future__ import annotations

import ast
import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gptq_literal import gptq_literal
from measures_literal import kl_divergence
from sparsegpt_literal import sparsegpt_literal
from torch.utils.flop_counter import FlopCounterMode

from evopress.compress.gptq import GPTQ
from evopress.compress.sparsegpt import sparsegpt
from evopress.errors import EvoPressError
from evopress.fitness.population import PopulationEvaluator
from evopress.levels.live import LiveModel
from evopress.models.blocks import BlockModel
from experiments.benchmark import __main__ as benchmark
from experiments.benchmark import forward, growth, measure, plain, profiling, search, sweeps, tables, targets, work
from experiments.benchmark.levels import searched
from experiments.benchmark.measure import Meter, PeakMemory, Rates
from experiments.benchmark.report import read_rows
from experiments.benchmark.rows import Bench, Row
from experiments.benchmark.sizes import ROWS, Shape, Size, load_size, size_names, table8
from experiments.benchmark.subject import make_blocks, make_streamed_blocks

CPU = torch.device("cpu")
ROOT = Path(benchmark.__file__).resolve().parents[2]
SHAPE = Shape(hidden_size=32, intermediate_size=64, num_blocks=3, num_heads=4, num_kv_heads=2, vocabulary=64)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of the smoke size, measured once."""
    out = tmp_path_factory.mktemp("benchmark") / "smoke"
    benchmark.run(load_size("smoke"), names=load_size("smoke").parts, out=out, label="before")
    return out


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of the parts that take no time."""
    out = tmp_path_factory.mktemp("benchmark") / "few"
    benchmark.run(load_size("smoke"), names=("e", "f", "g", "yardstick"), out=out, label="before")
    return out


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """What a part is given at the smoke size."""
    size = load_size("smoke")
    return Bench(size, Meter(CPU, repeats=1, long_seconds=60.0), Rates(CPU, most_rows=64, samples=1), tmp_path)


def inputs(rows: int, columns: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a weight and the Hessian of correlated inputs, one column of them never active."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=generator)
    X = torch.randn(4 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    X[:, 3] = 0.0
    return W, 2.0 * X.T @ X / 8


def prepared(W: torch.Tensor, H: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the plain sweeps get: W without its dead columns, and the factor."""
    W = W.clone()
    W[:, H.diagonal() == 0] = 0.0
    return W, plain.factor(H)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Tell whether all but a few entries are equal beyond rounding: a rounding may go the other way."""
    return sweeps.num_different(found, expected.float()) <= found.numel() // 100


@pytest.mark.parametrize(("columns", "group_size", "block_size"), [(64, 16, 32), (64, 64, 32), (96, 48, 32), (40, 8, 16)])
def test_plain_gptq_is_the_literal_and_the_fast_one(columns: int, group_size: int, block_size: int) -> None:
    W, H = inputs(24, columns)
    for bits in (4, 2):
        found = plain.gptq(*prepared(W, H), bits=bits, group_size=group_size, block_size=block_size)
        fast = GPTQ(bits=(bits,), group_size=group_size).compress({"w": W}, H)["w"][0].payload.decode()
        assert close(found, gptq_literal(W, H, bits=bits, group_size=group_size))
        assert close(found, fast)
        assert found.abs().sum() > 0
        assert not torch.equal(found, W)


def test_plain_sparsegpt_is_the_literal_and_the_fast_one() -> None:
    W, H = inputs(12, 40)
    for kept in (0, 100, 333, W.numel() - len(W)):
        found = plain.sparsegpt(*prepared(W, H), kept=kept, block_size=16)
        literal, mask = sparsegpt_literal(W.numpy(), H.numpy(), kept, block_size=16)
        fast = sparsegpt({"w": W}, H, {"w": [kept]}, block_size=16)["w"][0].payload.decode()
        assert close(found, torch.from_numpy(literal))
        assert close(found, fast)
        assert int((found != 0).sum()) <= kept == int(mask.sum())


def test_plain_kl_is_the_literal() -> None:
    logits = 3.0 * torch.randn(2, 30, 50, generator=torch.Generator().manual_seed(1))
    expected = float(kl_divergence(logits[0], logits[1])[:-1].sum())
    assert plain.stored_kl(logits[0], logits[1], chunk_tokens=7) == pytest.approx(expected, rel=1e-5)


def test_level_files_come_back(tmp_path: Path) -> None:
    weight = torch.randn(4, 6).to(torch.bfloat16)
    plain.write_level(tmp_path, "model.layers.0.mlp.up_proj", "3", weight)
    assert torch.equal(plain.read_level(tmp_path, "model.layers.0.mlp.up_proj", "3"), weight)


def counted(path: Callable[[], Any]) -> int:
    """Count operations as torch does."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        path()
    return counter.get_total_flops()


@pytest.mark.parametrize("shape", [SHAPE, replace(SHAPE, head_dim=16, num_kv_heads=4)])
def test_operations_of_a_block_and_the_head_are_torchs(shape: Shape) -> None:
    """Attention in one run of queries computes all scores, so it is compared without the causal half."""
    blocks = make_blocks(shape, dtype="float32", device=CPU)
    hidden, length = torch.randn(3, 20, shape.hidden_size), 20
    blocks.prepare(length)
    needed = work.block_work(blocks, 1, [(3, length)], causal=False)
    assert work.total_flops(needed) == counted(lambda: blocks.run(1, hidden))
    assert work.head_work(blocks, 60).flops == counted(lambda: blocks.head().logits(hidden))
    halved = work.total_flops(needed) - work.total_flops(work.block_work(blocks, 1, [(3, length)]))
    assert halved == pytest.approx(3 * 2 * length**2 * shape.num_heads * (shape.head_dim or 8))


def test_operations_of_hessian_error_and_sweep_are_torchs() -> None:
    X, W = torch.randn(50, 24), torch.randn(7, 24)
    assert work.hessian_work(24, 50).flops == pytest.approx(counted(lambda: X.T @ X) * 25 / 48)  # one triangle with the diagonal
    assert work.error_work(7, 24).flops == pytest.approx(counted(lambda: W @ torch.eye(24)) * 25 / 48)
    # Every column reaches the later ones: (C - 1) + (C - 2) + ... times rows, a multiplication and an addition each.
    assert work.sweep_work(7, 24).flops == pytest.approx(2 * 7 * sum(range(24)))
    assert work.factor_work(24).flops == pytest.approx(2 / 3 * 24**3)


@pytest.mark.parametrize("method", ["quant", "drop"])
def test_distinct_states_are_those_that_the_evaluator_runs(bench: Bench, method: str) -> None:
    found = searched(method, bench.subject, bench.size, bench.scratch)
    settings = table8({"quant": "quantization", "drop": "depth_pruning"}[method], bench.size)
    run = search.prepare(found, bench.subject, bench.size, settings, seed=0)
    evaluator = PopulationEvaluator(found.live)
    outcome = run.run(evaluator)
    expected = 0
    for question in outcome.questions:
        runs, num_final = work.distinct_states(found.live, question.genomes)
        tokens = sum(count * length for count, length in work.lengths_of(question.tokens, bench.size.sequence_length))
        expected += tokens * sum(len(states) for states in runs)
        assert 1 < num_final <= len(set(question.genomes))
    assert evaluator.num_block_tokens == expected
    assert isinstance(found.live, LiveModel)


def test_dropped_modules_need_no_operations(bench: Bench) -> None:
    live = searched("drop", bench.subject, bench.size, bench.scratch).live
    kept = (0,) * len(live.space)
    ends = {i: unit.levels[-1].key for i, unit in enumerate(live.space.units)}
    without = tuple(int(i == 0) for i in ends)  # the first block's attention is dropped
    both = [work.search_work(live, [work.Question((genome,), 32)], sequence_length=32) for genome in (kept, without)]
    blocks = bench.subject.blocks
    attention = work.total_flops(work.block_work(blocks, 0, [(1, 32)], mlp=False))
    assert work.total_flops(both[0]) - work.total_flops(both[1]) == pytest.approx(attention)


def test_the_smoke_size_measures_every_part(smoke: Path) -> None:
    rows = read_rows(smoke)
    assert [row.error for row in rows if row.error] == []
    assert {row.part for row in rows} == {*"abcdefg", "limit", "growth"}
    for row in rows:
        assert row.fast_seconds > 0
        assert row.part in ("limit", "growth") or (row.plain_seconds > 0 and row.ratio > 0)
        assert row.part in ("f", "growth") or row.limit_share > 0
    assert [row.case for row in rows if row.part == "d"] == [*ROWS, "quantization, sharing alone"]
    assert [0 < row.products_share < 1 for row in rows if row.part == "limit"] == [True]


def test_fast_and_plain_agree_at_the_smoke_size(smoke: Path) -> None:
    rows = {(row.part, row.case.split()[0]): row for row in read_rows(smoke) if row.plain_seconds > 0}
    assert all(row.same == "yes" for (part, _), row in rows.items() if part == "d")
    most = {"a": 1e-6, "b": 1e-4, "c": 1e-3, "d": 1e-3, "e": 1e-3, "f": 0.0, "g": 1e-5}
    assert {key: row.difference for key, row in rows.items() if not row.difference <= most[key[0]]} == {}
    database = rows["c", "GPTQ"]
    assert database.fast_bytes < database.plain_bytes


def test_files_of_the_smoke_size(smoke: Path) -> None:
    with (smoke / "where_time_goes.csv").open() as file:
        where = list(csv.DictReader(file))
    assert sum(float(row["share"]) for row in where) == pytest.approx(1.0, abs=1e-6)
    assert {"matrix products", "attention", "other"} == {row["group"] for row in where}
    with (smoke / "growth.csv").open() as file:
        grown = list(csv.DictReader(file))
    axes = load_size("smoke").growth or {}
    assert {(row["axis"], int(row["value"])) for row in grown} == {(axis, v) for axis, values in axes.items() for v in values}
    machine = json.loads((smoke / "machine.json").read_text())
    assert machine["parts"]["d"]["label"] == "before" and machine["parts"]["d"]["flops_per_second"]
    text = (smoke / "table.md").read_text()
    assert "| d | quantization |" in text and "## Growth" in text and "FAILED" not in text
    assert {path.name for path in smoke.glob("*.svg")} == {"where_time_goes.svg", "growth.svg"}
    assert not [path for path in smoke.iterdir() if path.name.startswith(".") or path.is_dir()]


def test_a_part_that_fails_becomes_a_row_and_others_stay(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "results.csv").write_bytes((few / "results.csv").read_bytes())
    before = read_rows(few)
    assert {row.part for row in before} >= {"e", "f", "g"}

    def broken(bench: Bench) -> Iterator[Row]:
        yield Row(part="a", case="half", fast_seconds=1.0)
        raise EvoPressError("it broke: mend it")

    def typo(bench: Bench) -> Iterator[Row]:
        raise KeyError("gone")

    makers = benchmark.parts() | {"a": broken, "b": typo}
    monkeypatch.setattr(benchmark, "parts", lambda: makers)
    text = benchmark.run(load_size("smoke"), names=("a", "b", "yardstick"), out=tmp_path)
    after = read_rows(tmp_path)
    assert [(row.case, row.error) for row in after if row.part == "a"] == [
        ("half", ""),
        (benchmark.TITLES["a"], "it broke: mend it"),
    ]
    assert [row.error for row in after if row.part == "b"] == ["KeyError: 'gone'"]
    assert [repr(row) for row in after if row.part > "b"] == [repr(row) for row in before if row.part > "b"]
    assert "FAILED: it broke: mend it" in text


def test_two_runs_are_put_beside_each_other(few: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(["--compare", str(few), "--out", str(few)])
    lines = capsys.readouterr().out.splitlines()
    count = len([row for row in read_rows(few) if row.plain_seconds > 0])
    assert sum("1.00×" in line for line in lines) >= count >= 5
    halved = [replace(row, fast_seconds=row.fast_seconds / 2) for row in read_rows(few)]
    assert tables.comparison(read_rows(few), halved).count("2.00×") >= count


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--size", "huge"], "--size huge is unknown"),
        (["--parts", "a,z"], "names no part z"),
        (["--repeats", "0"], "--repeats 0 is out of range"),
        (["--threads", "0"], "--threads 0 is out of range"),
        (["--compare", "nowhere"], "has no results.csv"),
    ],
)
def test_bad_arguments_end_with_a_sentence(argv: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(EvoPressError, match=said):
        benchmark.main([*argv, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_gpu_size_is_refused_without_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(EvoPressError, match="sees 0 CUDA devices"):
        benchmark.main(["--size", "llama_8b_gpu", "--out", str(tmp_path / "out")])
    with pytest.raises(EvoPressError, match="--device-memory 24 bounds the memory of a CUDA device"):
        benchmark.main(["--device-memory", "24", "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("name", size_names())
def test_sizes_name_what_there_is(name: str) -> None:
    size = load_size(name)
    assert set(size.parts) <= set(benchmark.TITLES) == set(benchmark.parts())
    assert set(size.rows) <= set(ROWS) and set(size.profiled) <= set(ROWS)
    assert size.model == "smollm2_135m" or size.shape is not None
    assert ("growth" in size.parts) == bool(size.growth) and ("stream" in size.parts) == bool(size.stream)


@pytest.mark.parametrize("scale", ["mini", "small", "paper"])
def test_rows_of_table_8_are_those_that_hydra_composes(scale: str) -> None:
    from hydra import compose, initialize_config_dir

    from evopress import config as configuration

    configuration.register()
    size = Size(name="x", about="", parts=(), model="", scale=scale)
    with initialize_config_dir(version_base="1.3", config_dir=str(configuration.config_folder())):
        for row, method in ROWS.items():
            settings = configuration.to_settings(compose("config", [f"+method={method}", f"search={row}", f"scale={scale}"]))
            mine, composed = table8(row, size), settings.search
            assert mine.tokens == composed.tokens
            assert mine.survivors == composed.survivors
            assert (mine.num_offspring, mine.exchange) == (composed.num_offspring, composed.exchange)
            assert (mine.max_switches, mine.distribution) == (composed.max_switches, composed.distribution)


def test_nothing_that_a_bare_machine_lacks_is_imported_at_the_start() -> None:
    """Hydra, matplotlib and the like are met only where they are used."""
    seen: set[str] = set()

    def follow(module: str) -> Iterator[str]:
        path = ROOT / Path(*module.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if module in seen or not path.is_file():
            return
        seen.add(module)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = (
                [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)] if isinstance(node, ast.ImportFrom) else []
            )
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                if name is not None and name.split(".")[0] in ("evopress", "experiments"):
                    yield from follow(name)
                elif name is not None:
                    yield name.split(".")[0]

    found = {name for path in Path(benchmark.__file__).parent.glob("*.py") for name in follow(f"experiments.benchmark.{path.stem}")}
    assert "torch" in found and "evopress.levels.build" in seen
    assert found & {"hydra", "omegaconf", "matplotlib", "pandas", "wandb", "datasets", "lm_eval", "scipy", "yaml"} == set()


def test_paths_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    for long_seconds, passes in ((60.0, 3), (-1.0, 2)):
        order.clear()
        meter = Meter(CPU, repeats=3, long_seconds=long_seconds)
        fast, slow = meter.alternate(lambda: order.append("fast"), lambda: order.append("plain"))
        assert len(fast.samples) == len(slow.samples) == passes
        timed = passes + (long_seconds > 0)  # a long plain pass counts although it was the first
        assert order == ["plain", "fast"] * timed


@pytest.mark.parametrize("sampled", [False, True])
def test_peak_memory_is_what_was_held_in_between(sampled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if sampled:
        monkeypatch.setattr(measure, "_reset_high_water", lambda resident: False)
    size = 96 * 2**20
    with PeakMemory() as memory:
        block = torch.ones(size // 4)
        threshold = float(block.sum())
        del block
    assert threshold == size // 4
    assert 0.9 * size < memory.peak - memory.start < 3 * size
    with PeakMemory() as memory:
        torch.ones(10)
    assert memory.peak - memory.start < size // 2


def test_the_limit_is_the_products_time_at_their_rate() -> None:
    rates = Rates(CPU, most_rows=64, samples=2)
    product = work.Product(1000, 32, 48, torch.float32)
    rate = rates.rate(product)
    assert rate > 0 and rates.rate(replace(product, rows=64)) == rate  # one measurement for both
    assert list(rates.measured) == ["1x64x32x48 float32"]
    assert rates.limit_seconds([product, product.times(2)]) == pytest.approx(3 * product.flops / rate)
    assert work.merged([product, product.times(2)]) == [product.times(3)]
    assert rates.rate(work.Product(8, 8, 8, torch.bfloat16, batch=3)) > 0


def test_time_is_divided_by_what_an_operator_is_for() -> None:
    def event(name: str, seconds: float, parent: Any = None) -> SimpleNamespace:
        return SimpleNamespace(name=name, self_cpu_time_total=1e6 * seconds, cpu_parent=parent)

    span = event("benchmark.attention", 0.5)
    events = [
        span,
        event("aten::bmm", 2.0, span),
        event("aten::_softmax", 1.0, event("aten::softmax", 0.0, span)),
        event("aten::addmm", 3.0, span),
        event("aten::_softmax", 4.0),
        event("aten::bmm", 5.0),
        *(event(f"aten::op{i}", 0.01) for i in range(20)),
    ]
    rows = dict(profiling.shortened(profiling.divided(events, on_device=False)))
    assert rows[profiling.MATRIX, profiling.MATRIX] == pytest.approx(8.0)
    assert rows[profiling.ATTENTION, profiling.ATTENTION] == pytest.approx(3.5)
    assert rows[profiling.OTHER, "aten::_softmax"] == pytest.approx(4.0)
    assert rows[profiling.OTHER, "the rest"] == pytest.approx(11 * 0.01)


def test_exponents_are_fitted() -> None:
    assert growth.exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2.0)
    assert growth.exponent([1, 2], [0.0, 1.0]) != growth.exponent([1, 2], [0.0, 1.0])  # NaN


def test_growth_that_is_worse_than_promised_is_said(bench: Bench) -> None:
    def timing(seconds: float) -> Any:
        return measure.Timing(None, 0, 10, 0, [seconds])

    said = growth.record(bench, "search", "offspring", [(1, timing(1.0)), (2, timing(4.0)), (4, timing(16.0))])
    assert "WORSE THAN PROMISED" in said[0] and "2.00" in said[0] and "WORSE" not in said[1]
    assert [row["value"] for row in bench.growth] == [1, 2, 4]
    # Half of the time does not grow at first: the fit over all is still harmless, the end is not.
    said = growth.record(bench, "search", "tokens", [(1, timing(10.0)), (2, timing(10.5)), (4, timing(30.0))])
    assert "0.79, 1.51 at the end (promised 1, WORSE" in said[0]
    said = growth.record(bench, "database", "blocks", [(1, timing(1.0)), (2, timing(2.0))])
    assert "WORSE" not in said[0] and "0.00 at the end (promised 0)" in said[1]


def test_targets_and_yardstick_are_read_off_the_rows() -> None:
    rows = [
        Row(part="b", case="GPTQ sweeps of a block", fast_seconds=1.0, plain_seconds=7.0),
        Row(part="d", case="super_fast", fast_seconds=1.0, plain_seconds=3.0, same="no", fast_tokens_per_second=2500.0),
        Row(
            part="c", case="GPTQ 5 levels", fast_bytes=1.0, plain_bytes=2.0, fast_seconds=1.0, plain_seconds=4.0, whole_seconds=40.0
        ),
    ]
    verdicts = [line.split("|")[-2].strip() for line in targets.targets_table(rows).splitlines()[2:]]
    assert verdicts == ["met", "met", "not met", "not met, other winners", *["not measured"] * 4]
    text = targets.yardstick_table(rows)
    assert "40 s" in text and "super_fast 2,500" in text and "440–655 s" in text


def test_streamed_blocks_share_memory_and_run(tmp_path: Path) -> None:
    """On a CPU nothing is moved; that every block is a block of its own, at the first one's weights, shows here too."""
    blocks = make_streamed_blocks(SHAPE, dtype="float32", device=CPU)
    assert len(blocks.blocks) == SHAPE.num_blocks
    pointers = [[parameter.data_ptr() for parameter in block.parameters()] for block in blocks.blocks]
    assert pointers[0] == pointers[1] == pointers[2] and len(set(map(id, blocks.blocks))) == SHAPE.num_blocks
    ids = torch.arange(20).reshape(2, 10)
    whole = blocks.model(input_ids=ids, use_cache=False).logits
    assert torch.allclose(blocks.head().logits(forward.dense_states(blocks, ids)), whole, atol=1e-5)
    blocks.blocks[1].mlp.up_proj.weight.data = torch.zeros(64, 32)
    assert bool(blocks.blocks[0].mlp.up_proj.weight.any())


def test_first_blocks_are_a_model_and_are_given_back(bench: Bench) -> None:
    ids = bench.subject.tokens("search", 32)
    before = forward.dense_states(bench.subject.blocks, ids)
    with bench.subject.first_blocks(1) as first:
        assert len(first.blocks) == 1
        assert not torch.equal(forward.dense_states(first, ids), before)
        assert isinstance(first, BlockModel)
    assert torch.equal(forward.dense_states(bench.subject.blocks, ids), before)


def test_a_compiled_block_that_cannot_be_compiled_is_a_sentence(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(function: Callable[..., Any]) -> Callable[..., Any]:
        def fails(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("no C++ compiler")

        return fails

    monkeypatch.setattr(torch, "compile", no_compiler)
    rows = list(forward.dense_forward(replace(bench, size=replace(bench.size, compiled=True))))
    assert [row.note for row in rows if "compiled" in row.case] == ["not compiled: RuntimeError: no C++ compiler"]


@pytest.mark.slow
def test_a_search_in_a_process_of_its_own(bench: Bench) -> None:
    rows: Sequence[Row] = list(search.memory(bench))
    assert [row.error for row in rows] == [""]
    assert 10e6 < rows[0].fast_peak_bytes < 4e9
