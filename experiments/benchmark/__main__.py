"""Measure every fast path against its plain way and the machine's limit.

    python -m experiments.benchmark --size smollm2 [--parts a,b,d] [--repeats 5] [--label before]
    python -m experiments.benchmark --size smollm2 --label after --compare experiments/benchmark/results/smollm2-before

writes results.csv, table.md, where_time_goes.csv, growth.csv, figures and machine.json to experiments/benchmark/results/<size>.
"""

from __future__ import annotations

import argparse
import gc
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evopress.errors import EvoPressError
from evopress.progress import duration
from experiments.benchmark.sizes import Size, load_size, size_names
from experiments.scripts import in_one_sentence

if TYPE_CHECKING:
    from experiments.benchmark.rows import Bench, Row

logger = logging.getLogger(__name__)
RESULTS = Path(__file__).parent / "results"
TITLES = {
    "a": "Hessians, shared against per layer",
    "b": "column sweeps, stacked against one per unit and level",
    "c": "level database, packed against dequantized",
    "d": "a generation of each row of Table 8",
    "e": "KL divergence, chunked against stored logits",
    "f": "level switching, packed against files",
    "g": "a dense forward",
    "limit": "where the time of a search goes",
    "memory": "peak memory of a search in a process of its own",
    "growth": "growth with blocks, width, offspring, tokens and vocabulary",
    "stream": "a model larger than the device",
    "yardstick": "the authors' code, quoted",
}


def parts() -> dict[str, Callable[[Bench], Iterator[Row]]]:
    """Return what measures each part; the yardstick is made of the others' rows."""
    from experiments.benchmark import database, forward, growth, profiling, search, stream, sweeps

    return {
        "a": sweeps.hessians,
        "b": sweeps.sweeps,
        "c": database.database,
        "d": search.generations,
        "e": forward.kl,
        "f": forward.switching,
        "g": forward.dense_forward,
        "limit": profiling.limit,
        "memory": search.memory,
        "growth": growth.growth,
        "stream": stream.stream,
        "yardstick": lambda bench: iter(()),
    }


def measure(bench: Bench, names: Sequence[str]) -> list[Row]:
    """Measure parts one after the other; one that fails becomes a row with its sentence, and the others go on."""
    from experiments.benchmark.rows import Row

    makers, rows = parts(), []
    for number, name in enumerate(names, 1):
        logger.info("part %s (%d of %d): %s", name, number, len(names), TITLES[name])
        gc.collect()
        started = time.monotonic()
        try:
            for row in makers[name](bench):
                rows.append(row)
                logger.info("  %s, after %s", _said(row), duration(time.monotonic() - started))
        except Exception as error:  # whatever it is, the parts after it are worth having
            sentence = str(error) if isinstance(error, EvoPressError) else f"{type(error).__name__}: {error}"
            logger.debug("part %s failed", name, exc_info=True)
            logger.warning("  part %s failed: %s", name, sentence)
            rows.append(Row(part=name, case=TITLES[name], error=" ".join(sentence.split())[:500]))
    return rows


def _said(row: Row) -> str:
    from experiments.benchmark.tables import show, show_seconds

    found = [
        show_seconds(row.fast_seconds),
        show(row.ratio, "{:.2f}× as fast as plain"),
        show(row.limit_share, "{:.0%} of the limit"),
    ]
    return ", ".join([row.case, *(part for part in found if part)])


def run(size: Size, *, names: Sequence[str], out: Path, label: str = "", seed: int = 0) -> str:
    """Measure parts of a size, write the files and return the table.

    Raises: EvoPressError if the size's device is not there, or a folder cannot be written to.
    """
    import torch
    import transformers

    from evopress import machine
    from evopress.models.loading import pick_device
    from experiments.benchmark.measure import Meter, Rates
    from experiments.benchmark.report import cpu_name, write_results
    from experiments.benchmark.rows import Bench

    device = pick_device(size.device)
    transformers.utils.logging.disable_progress_bar()
    scratch = Path(tempfile.mkdtemp(prefix="evopress-benchmark-"))
    try:
        bench = Bench(
            size,
            Meter(device, repeats=size.repeats, long_seconds=size.long_seconds),
            Rates(device, most_rows=size.most_product_rows),
            scratch,
            seed,
        )
        with torch.no_grad():
            rows = measure(bench, names)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    about: dict[str, Any] = {
        **machine.describe(torch.get_num_threads()),
        "cpu": cpu_name(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "label": label,
        "measured": time.strftime("%Y-%m-%d %H:%M:%S"),
        "flops_per_second": bench.rates.measured,
    }
    return write_results(out, size, rows, parts=names, where=bench.where, growth=bench.growth, machine=about)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmark", description="Measure fast paths against plain ones.")
    parser.add_argument("--size", default="smoke", help=f"{', '.join(size_names())} (default %(default)s)")
    parser.add_argument("--parts", default=None, help=f"some of {','.join(TITLES)} (default: the size's)")
    parser.add_argument("--repeats", type=int, default=None, help="timed passes of each path (default: the size's)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads of torch (default: its choice)")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument("--device-memory", type=float, default=None, help="GB of the GPU to use at most")
    parser.add_argument("--out", type=Path, default=None, help="folder to write to (default: results/<size>[-<label>] here)")
    parser.add_argument("--label", default="", help="such as before or after")
    parser.add_argument("--compare", type=Path, default=None, help="measure nothing; print this folder's numbers beside --out's")
    arguments = parser.parse_args(argv)
    size = load_size(arguments.size)
    names = _names(arguments.parts, size)
    if arguments.repeats is not None:
        if arguments.repeats < 1:
            raise EvoPressError(f"--repeats {arguments.repeats} is out of range: expected at least 1")
        size = replace(size, repeats=arguments.repeats)
    out = arguments.out or RESULTS / (f"{size.name}-{arguments.label}" if arguments.label else size.name)
    if arguments.compare is not None:
        print(_compared(arguments.compare, out))
        return
    _set_machine(arguments.threads, arguments.device_memory)
    print(run(size, names=names, out=out, label=arguments.label, seed=arguments.seed))
    print(f"written to {out}")


def _names(text: str | None, size: Size) -> tuple[str, ...]:
    """Return the parts that were asked for."""
    if text is None:
        return size.parts
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in TITLES]
    if unknown or not names:
        raise EvoPressError(f"--parts {text!r} names no part {unknown[0] if unknown else ''}: choose among {', '.join(TITLES)}")
    return names


def _set_machine(threads: int | None, device_memory: float | None) -> None:
    """Set the number of threads, how memory is kept, and a bound on the device's.

    Raises: EvoPressError if a number is out of range, or there is no device to bound.
    """
    import torch

    from evopress import machine

    if threads is not None:
        if threads < 1:
            raise EvoPressError(f"--threads {threads} is out of range: expected at least 1")
        torch.set_num_threads(threads)
    if device_memory is not None:
        if not torch.cuda.is_available():
            raise EvoPressError(
                f"--device-memory {device_memory:g} bounds the memory of a CUDA device and there is none: leave it out"
            )
        total = torch.cuda.get_device_properties(0).total_memory
        if not 0 < device_memory * 1e9 <= total:
            raise EvoPressError(f"--device-memory {device_memory:g} is out of range: the device has {total / 1e9:.1f} GB")
        torch.cuda.set_per_process_memory_fraction(device_memory * 1e9 / total)
    machine.keep_freed_memory()
    machine.exact_products()


def _compared(before: Path, after: Path) -> str:
    from experiments.benchmark.report import read_rows
    from experiments.benchmark.tables import comparison

    found = {folder: read_rows(folder) for folder in (before, after)}
    for folder, rows in found.items():
        if not rows:
            raise EvoPressError(f"{folder} has no results.csv: measure there first")
    return comparison(found[before], found[after])


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("evopress").setLevel(logging.WARNING)
    with in_one_sentence():
        main()
