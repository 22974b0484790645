"""Compare a run's zero-shot numbers with the lm-eval command line's on the checkpoints, task by task.

Run by `python -m experiments.zero_shot.run RUN_FOLDER --tasks-path FOLDER --checkpoint dense=FOLDER --checkpoint evopress=FOLDER`.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from evopress.errors import EvoPressError
from evopress.files import write_bytes
from evopress.stages.results import read_result
from experiments.scripts import existing, in_one_sentence


def lm_eval(
    checkpoint: Path, tasks: list[str], *, tasks_path: Path, limit: int | None, batch_size: int, dtype: str
) -> dict[str, float]:
    """Return the accuracy of each task as `lm_eval --model hf` prints it for a checkpoint on the CPU.

    Raises: EvoPressError if the command fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--include_path", "."),
            *("--model_args", f"pretrained={checkpoint},dtype={dtype}", "--tasks", ",".join(tasks)),
            *("--batch_size", str(batch_size), "--output_path", folder),
            *(("--limit", str(limit)) if limit else ()),
        ]
        # The task files name their data relative to the folder that they are used from.
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, cwd=tasks_path, env=environment, capture_output=True, text=True)
        written = sorted(Path(folder).rglob("results_*.json"))
        if done.returncode or not written:
            raise EvoPressError(f"`{' '.join(command)}` failed: {(done.stderr.strip() or 'no output').splitlines()[-1]}")
        results = json.loads(written[-1].read_text(encoding="utf-8"))["results"]
    return {task: results[task]["acc,none"] for task in tasks}


def compare(row: dict[str, Any], theirs: dict[str, float] | None) -> list[dict[str, Any]]:
    """Return a line per task: our accuracy and its standard error, lm-eval's accuracy, how many answers apart they are.

    Args: theirs: by task; None: it was not asked.
    """
    lines = []
    for task, accuracy in row["zero_shot"].items():
        other = "" if theirs is None else theirs[task if task in theirs else f"{task}_local"]
        questions = row["zero_shot_questions"][task]
        lines.append(
            {
                "model": row["name"],
                "task": task,
                "questions": questions,
                "accuracy": accuracy,
                "stderr": row["zero_shot_stderr"][task],
                "lm_eval": other,
                "answers_apart": "" if other == "" else round((accuracy - other) * questions),
                "flip_rate": row.get("flip_rate_by_task", {}).get(task, ""),
            }
        )
    return lines


def table(lines: list[dict[str, Any]], means: dict[str, tuple[float, float, float | None]]) -> str:
    """Return Markdown: a line for each task of a model that both have, then all models' means, standard errors and flip rates."""
    head = "| model | task | questions | ours | lm_eval | answers apart | flip rate |\n"
    head += "| --- | --- | ---: | ---: | ---: | ---: | ---: |\n"
    body = ""
    for line in lines:
        if line["lm_eval"] == "":
            continue
        flips = "" if line["flip_rate"] == "" else f"{line['flip_rate']:.3f}"
        body += (
            f"| {line['model']} | {line['task']} | {line['questions']} | {line['accuracy']:.3f} ± {line['stderr']:.3f} | "
            f"{line['lm_eval']:.3f} | {line['answers_apart']} | {flips} |\n"
        )
    body += "\n| model | mean accuracy | flip rate |\n| --- | ---: | ---: |\n"
    for name, (mean, stderr, flips_mean) in means.items():
        body += f"| {name} | {mean:.3f} ± {stderr:.3f} | {'' if flips_mean is None else f'{flips_mean:.3f}'} |\n"
    return head + body


@in_one_sentence()
def main() -> None:
    """Read the run, ask lm-eval, write `results.csv` and `table.md`."""
    parser = argparse.ArgumentParser(description="Compare a run's zero-shot numbers with the lm-eval command line's.")
    parser.add_argument("run", type=Path, help="run folder whose result.json has zero-shot numbers")
    parser.add_argument("--tasks-path", type=Path, required=True, help="folder with lm-eval task files and their data")
    parser.add_argument("--checkpoint", action="append", required=True, metavar="ROW=FOLDER", help="checkpoint of a row of the run")
    parser.add_argument("--limit", type=int, default=None, help="first questions of each task, as in the run")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    rows = {row["name"]: row for row in read_result(arguments.run).get("rows", [])}
    lines, means = [], {}
    checkpoints = {name: existing(folder) for name, _, folder in (given.partition("=") for given in arguments.checkpoint)}
    existing(arguments.tasks_path)
    for name in checkpoints:
        if name not in rows or "zero_shot" not in rows[name]:
            raise EvoPressError(f"{arguments.run} has no zero-shot numbers of {name!r}: it has {', '.join(rows) or 'no rows'}")
    for name, row in rows.items():
        if "zero_shot" not in row:
            continue
        theirs = None
        if name in checkpoints:
            theirs = lm_eval(
                checkpoints[name].resolve(),
                [f"{task}_local" for task in row["zero_shot"]],
                tasks_path=arguments.tasks_path,
                limit=arguments.limit,
                batch_size=arguments.batch_size,
                dtype=arguments.dtype,
            )
        lines += compare(row, theirs)
        means[name] = (row["zero_shot_mean"], row["zero_shot_mean_stderr"], row.get("flip_rate"))
    text = table(lines, means)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_bytes(arguments.out / "table.md", text.encode())
    written = io.StringIO()
    writer = csv.DictWriter(written, fieldnames=list(lines[0]))
    writer.writeheader()
    writer.writerows(lines)
    write_bytes(arguments.out / "results.csv", written.getvalue().encode())
    print(text)


if __name__ == "__main__":
    main()
