"""One generation in a process of its own, so that its peak memory is a search's and nothing else's: prints a line of JSON."""

from __future__ import annotations

import argparse
import json
import resource
import time

from evopress import machine
from evopress.levels.live import LiveModel
from evopress.levels.store import LevelDatabase
from evopress.methods.quant import Quantization
from evopress.settings import QuantSettings
from experiments.benchmark.levels import Searched
from experiments.benchmark.search import EVALUATORS, prepare
from experiments.benchmark.sizes import load_size, table8
from experiments.benchmark.subject import load_subject
from experiments.scripts import file_to_read, in_one_sentence


@in_one_sentence()
def main() -> None:
    """Load the model, open the database, run a generation, print its seconds and the peak."""
    parser = argparse.ArgumentParser(description="Run one generation and print its time and peak memory.")
    parser.add_argument("--size", required=True)
    parser.add_argument("--row", required=True)
    parser.add_argument("--evaluator", required=True, choices=tuple(EVALUATORS))
    parser.add_argument("--database", required=True, type=file_to_read, help="of quantization levels of all blocks")
    arguments = parser.parse_args()
    machine.keep_freed_memory()
    machine.exact_products()
    size = load_size(arguments.size)
    subject = load_subject(size)
    database = LevelDatabase.open(arguments.database)
    budget = Quantization(QuantSettings(), size.bits).budget(database.space)
    found = Searched(LiveModel(subject.blocks, database), budget)
    run = prepare(found, subject, size, table8(arguments.row, size), seed=0)
    evaluator = EVALUATORS[arguments.evaluator](found.live, max_tokens_in_flight=size.max_tokens_in_flight)
    started = time.perf_counter()
    run.run(evaluator)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


if __name__ == "__main__":
    main()
