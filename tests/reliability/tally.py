"""Count injected faults: tests report here, and `python tests/reliability/tally.py FILE` prints the table.

With the environment variable EVOPRESS_TALLY naming a file, every call of `record` appends one JSON line to it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

VARIABLE = "EVOPRESS_TALLY"


def record(kind: str, *, injected: int, survived: int, lost: int = 0) -> None:
    """Note that `injected` faults of a kind were put in, of which so many were survived and so many lost work.

    Call it before asserting that nothing was lost, so that a failing test is counted too.
    """
    file = os.environ.get(VARIABLE)
    if not file:
        return
    line = json.dumps({"kind": kind, "injected": injected, "survived": survived, "lost": lost}) + "\n"
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())  # one write of one line, so that processes side by side do not mix theirs
    finally:
        os.close(descriptor)


def table(lines: Iterable[str]) -> str:
    """Return the Markdown table of what was recorded: kinds in the order of first mention, a total last."""
    totals: dict[str, list[int]] = {}
    for line in lines:
        if line.strip():
            entry = json.loads(line)
            counts = totals.setdefault(entry["kind"], [0, 0, 0])
            for place, key in enumerate(("injected", "survived", "lost")):
                counts[place] += entry[key]
    rows = [*totals.items(), ("**all**", [sum(column) for column in zip(*totals.values(), strict=True)] or [0, 0, 0])]
    body = [f"| {kind} | {injected:,} | {survived:,} | {lost:,} |" for kind, (injected, survived, lost) in rows]
    return "\n".join(["| kind | injected | survived | lost |", "|---|---:|---:|---:|", *body])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/reliability/tally.py FILE")
    print(table(Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()))
