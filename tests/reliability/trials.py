"""A run that is killed, goes on and ends: compared with one that nobody disturbed, and counted."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dying import STAGES, Death, Event, go_on, run_child
from tally import record

SHORT = "stages=[database,baselines,search,evaluate]"
SECOND = "stages=[database,baselines,search,refine,evaluate,export]"
CASES = {
    "quant": ("+method=quant", "bits=3.5", "+debug=tiny", "search/strategy=evolution"),
    "quant at a level": (
        "+method=quant",
        "bits=3",
        "+debug=tiny",
        "search/strategy=evolution",
        "method.propagate_bits=null",
        "level_db.activations=disk",
    ),
    "sparsity": ("+method=sparsity", "sparsity=0.5", "+debug=tiny", "search/strategy=evolution"),
    "refined": (
        "+method=quant",
        "bits=3.5",
        "+debug=tiny",
        "search/strategy=evolution",
        "scale.refine=true",
        "baselines.names=[dp]",
    ),
    "drop": (
        *("+method=drop", "sparsity=0.34", "+debug=tiny", "search/strategy=evolution", "model.path=../six", "model.separator=null"),
        "baselines.names=[best_of_random,shortgpt,sliding_window,shortened_llama,exhaustive]",
    ),
}
"""Methods, and ways to begin: between two levels, at a level, with modules."""


def records_of(folder: Path) -> list[dict[str, Any]]:
    """Read a run's records without what the clock says."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def timeless(value: Any) -> Any:
    """Return what a JSON file holds without what the clock says."""
    if isinstance(value, dict):
        return {key: timeless(each) for key, each in value.items() if key not in ("seconds", "seconds_spent", "digest")}
    return [timeless(each) for each in value] if isinstance(value, list) else value


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of the level databases or of a checkpoint; locks, the command in it, seconds may differ."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock" and path.name != "evopress.json")
    return {str(path.relative_to(folder)): hashlib.sha256(_timeless_bytes(path)).hexdigest() for path in files}


def _timeless_bytes(path: Path) -> bytes:
    content = path.read_bytes()
    if not path.name.startswith(("scores-", "exhaustive-")):
        return content
    documents = content.splitlines() if path.suffix == ".jsonl" else [content]
    return json.dumps([timeless(json.loads(document)) for document in documents]).encode()


def left_behind(cwd: Path) -> list[str]:
    """Return temporary files."""
    return [str(path.relative_to(cwd)) for path in cwd.rglob("*") if ".tmp" in path.name]


def outcome(cwd: Path) -> dict[str, Any]:
    """Return all of a finished run that must not depend on whether it was killed."""
    run = cwd / "run"
    results = json.loads((run / "result.json").read_text(encoding="utf-8"))
    return {
        "genome.json": (run / "genome.json").read_bytes(),
        "genome.txt": (run / "genome.txt").read_bytes(),
        "metrics.jsonl": records_of(run),
        "baselines.json": timeless(json.loads((run / "baselines.json").read_bytes())),
        "rows": timeless(results["rows"]),
        "tokens": results["search"]["tokens"],
        "levels": digests(cwd / "levels"),
        "refined": digests(run / "refined"),
        "checkpoint": digests(run / "checkpoint") if (run / "checkpoint").exists() else {},
        "report": (run / "report.html").exists(),
        "temporary files": left_behind(cwd),
    }


@dataclass(frozen=True)
class Trials:
    """Kills of one run, and what it gives when it is not killed."""

    root: Path
    cache: Path
    arguments: tuple[str, ...]
    events: tuple[Event, ...]
    expected: dict[str, Any]

    def run(self, *deaths: Death, resume: bool, name: str, after: float | None = None) -> list[Event]:
        """Kill a fresh run, go on, kill that, and so on; let the last one finish, and compare.

        Args: after: seconds at which the first is killed from outside if it still lives.

        Returns: where it was killed.
        """
        cwd, where = self.root / name, []
        for death in deaths:
            ending = run_child(go_on(self.arguments, cwd, resume=resume), cwd=cwd, cache=self.cache, death=death, after=after)
            if ending.code == 0:
                continue
            met = [event for event in ending.events if death.of(event)][: death.nth + 1]  # after a signal, others may follow
            where.append(met[-1] if met and after is None else ending.events[-1] if ending.events else Event("", "start"))
            expected = 1 if death.error else -signal.SIGKILL if death.number == signal.SIGKILL else 128 + death.number
            assert ending.code == expected, ending.text
            if expected > 0:
                assert "Traceback" not in ending.text, ending.text
                assert len([line for line in ending.text.splitlines() if line.startswith("error: ")]) == 1, ending.text
                assert not left_behind(cwd), ending.text
        last = run_child(go_on(self.arguments, cwd, resume=resume), cwd=cwd, cache=self.cache)
        found = outcome(cwd) if last.code == 0 else {}
        wrong = [key for key, value in self.expected.items() if key not in found or found[key] != value]
        for death, event in zip(deaths, where, strict=False):
            fault = errno.errorcode[death.error] if death.error else signal.Signals(death.number).name
            record(f"{fault} in {STAGES[event.stage]}", injected=1, survived=int(not wrong), lost=int(bool(wrong)))
        assert last.code == 0, f"killed at {[str(event) for event in where]}: {last.text}"
        assert not wrong, f"killed at {[str(event) for event in where]}: {wrong} differ, see {cwd}"
        shutil.rmtree(cwd)
        return where
