"""What was ever measured of genomes on search text, in one file beside the level database: reused by later runs, budgets and seeds.

A number is reused only where measuring again would give the same bits. So a line belongs to a context: model, levels, text,
measure, code, versions and machine. And a genome's fitness is taken from among others' only where it was computed apart from them;
where several genomes share a forward, whose rounding depends on their number, all of a question must be the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from filelock import FileLock, Timeout

from evopress.data.minibatch import Minibatch
from evopress.files import canonical_json, is_sealed, seal
from evopress.units import Genome

logger = logging.getLogger(__name__)
ARCHIVE = "archive.jsonl"
"""The file's name, in the folder of the level database."""
_ROOMS = ("compress", "data", "fitness", "levels", "models")
"""Whose code decides the numbers."""
_MOST_BYTES = 2**28
"""Of the file; then nothing is added."""
_WAIT = 60.0
"""Seconds to wait for another run that adds a line."""

Means = Callable[[Sequence[Genome]], list[float]]
Measured = Callable[[], np.ndarray]


class Archiving(Protocol):
    """Answers from what was measured before, and keeps what is measured now."""

    def fitnesses(self, genomes: Sequence[Genome], minibatch: Minibatch, *, alone: bool, measure: Means) -> list[float]:
        """Return one number for each genome.

        Args:
            alone: a genome's number does not depend, to the bit, on the others that are measured with it.
            measure: measures genomes on the minibatch.
        """

    def attribution(
        self, genome: Genome, rows: Sequence[int], length: int, measure: Measured, *, drawn: np.ndarray | None = None
    ) -> np.ndarray:
        """Return what each unit of a genome holds, floats [sequences, units], on the first tokens of some rows of the text.

        Args: drawn: random numbers that it depends on beside these.
        """

    def tell(self, what: str) -> None:
        """Say in the log what was reused since this was last asked."""

    @property
    def reused(self) -> int:
        """Evaluations that were taken from it so far."""


class NoArchive:
    """Keeps nothing."""

    reused = 0

    def fitnesses(self, genomes: Sequence[Genome], minibatch: Minibatch, *, alone: bool, measure: Means) -> list[float]:
        """Measure."""
        return measure(genomes)

    def attribution(
        self, genome: Genome, rows: Sequence[int], length: int, measure: Measured, *, drawn: np.ndarray | None = None
    ) -> np.ndarray:
        """Measure."""
        return measure()

    def tell(self, what: str) -> None:
        """Say nothing."""


class Archive:
    """Lines of a file that any number of runs read when they begin and add to; see `Archiving`."""

    def __init__(self, path: Path, about: Mapping[str, Any], levels: Sequence[int]) -> None:
        """Read what there is of a context; damaged lines are skipped, which is said.

        Args:
            about: all that decides the numbers beside genome and tokens, JSON-able.
            levels: how many every unit has; a genome with others is not archived.
        """
        self._path, self._levels = path, tuple(levels)
        self._context = hashlib.sha256(canonical_json(about).encode()).hexdigest()[:16]
        self._lock = FileLock(path.with_name(f"{path.name}.lock"))
        self._open = True  # whether lines are added
        self._whole: dict[tuple[Any, tuple[Genome, ...]], list[float]] = {}
        self._each: dict[tuple[Any, Genome], float] = {}
        self._held: dict[tuple[Genome, tuple[int, ...], int, str], np.ndarray] = {}
        self._asked = self._reused = self._tokens_asked = self._tokens_reused = 0
        self.reused = 0
        self._read()

    def fitnesses(self, genomes: Sequence[Genome], minibatch: Minibatch, *, alone: bool, measure: Means) -> list[float]:
        """See `Archiving`. Numbers that are not finite are not kept."""
        if not all(map(self._knows, genomes)):
            return measure(genomes)
        key, asked = (minibatch.indices, minibatch.num_tokens), tuple(genomes)
        if alone:
            new = list(dict.fromkeys(genome for genome in asked if (key, genome) not in self._each))
        else:
            new = [] if (key, asked) in self._whole else list(asked)
        self._count(len(asked), len(asked) - len(new), minibatch.num_tokens)
        if new:
            values = measure(new)
            if not all(np.isfinite(values)):
                if len(new) == len(asked):
                    return values
                return measure(asked)
            self._keep(key, new, values)
            self._add({"rows": list(key[0]), "tokens": key[1], "genomes": [list(genome) for genome in new], "fitnesses": values})
        return [self._each[key, genome] for genome in asked] if alone else list(self._whole[key, asked])

    def attribution(
        self, genome: Genome, rows: Sequence[int], length: int, measure: Measured, *, drawn: np.ndarray | None = None
    ) -> np.ndarray:
        """See `Archiving`."""
        number = "" if drawn is None else hashlib.sha256(np.ascontiguousarray(drawn).tobytes()).hexdigest()
        key = (genome, tuple(rows), length, number)
        known = self._knows(genome) and key in self._held
        self._count(1, int(known), len(key[1]) * length)
        if not known:
            self._held[key] = np.asarray(measure(), dtype=np.float64)
            if self._knows(genome):
                told = {"rows": list(rows), "length": length, "drawn": number, "genome": list(genome)}
                self._add({**told, "attribution": self._held[key].tolist()})
        return self._held[key]

    def tell(self, what: str) -> None:
        """See `Archiving`."""
        if self._reused:
            logger.info(
                "%s: %s of %s evaluations, %s of %s tokens, were in the archive (%s)",
                what,
                f"{self._reused:,}",
                f"{self._asked:,}",
                f"{self._tokens_reused:,}",
                f"{self._tokens_asked:,}",
                self._path,
            )
        self._asked = self._reused = self._tokens_asked = self._tokens_reused = 0

    def _count(self, asked: int, reused: int, tokens: int) -> None:
        self._asked, self._reused, self.reused = self._asked + asked, self._reused + reused, self.reused + reused
        self._tokens_asked, self._tokens_reused = self._tokens_asked + asked * tokens, self._tokens_reused + reused * tokens

    def _knows(self, genome: Genome) -> bool:
        return len(genome) == len(self._levels) and all(level < count for level, count in zip(genome, self._levels, strict=True))

    def _keep(self, key: Any, genomes: Sequence[Genome], values: Sequence[float]) -> None:
        self._whole[key, tuple(genomes)] = list(values)
        self._each |= {(key, genome): value for genome, value in zip(genomes, values, strict=True)}

    def _read(self) -> None:
        if not self._path.exists():
            return
        damaged, mark = 0, f'"context":"{self._context}"'
        try:
            with open(self._path, encoding="utf-8", errors="replace") as file:
                for line in filter(None, map(str.strip, file)):
                    if line[0] != "{" or line[-1] != "}":
                        damaged += 1
                    elif mark in line:
                        damaged += not self._take(line)
        except OSError as error:
            self._give_up(error)
        if damaged:
            logger.warning("archive: %d damaged lines of %s are skipped; what they had is measured again", damaged, self._path)

    def _take(self, line: str) -> bool:
        """Take over a line of this context; return whether it is whole."""
        try:
            record = json.loads(line)
            if not is_sealed(record):
                return False
            rows = tuple(record["rows"])
            if "attribution" in record:
                held = np.asarray(record["attribution"], dtype=np.float64)
                self._held[tuple(record["genome"]), rows, record["length"], record["drawn"]] = held
            else:
                self._keep((rows, record["tokens"]), [tuple(genome) for genome in record["genomes"]], record["fitnesses"])
        except (ValueError, KeyError, TypeError):
            return False
        return True

    def _add(self, record: Mapping[str, Any]) -> None:
        """Add a line in one write, after what an interrupted one has left; a file that cannot be written to is left alone."""
        if not self._open:
            return
        line = canonical_json(seal({"schema": 1, "context": self._context, **record})).encode() + b"\n"
        try:
            with self._lock.acquire(timeout=_WAIT), open(self._path, "a+b") as file:
                size = file.seek(0, os.SEEK_END)
                if size + len(line) > _MOST_BYTES:
                    self._give_up(f"it has {size / 1e6:.0f} MB, and no more is added: remove it to begin another")
                    return
                if size:
                    file.seek(size - 1)
                    line = line if file.read(1) == b"\n" else b"\n" + line
                file.write(line)
        except (OSError, Timeout) as error:
            self._give_up(error)

    def _give_up(self, reason: object) -> None:
        self._open = False
        logger.warning("archive: %s is left alone (%s)", self._path, reason)


@cache
def code_digest(*further: str) -> str:
    """Return a digest of the code that decides the numbers.

    Args: further: rooms whose code decides them, too.
    """
    digest, package = hashlib.sha256(), Path(__file__).parent.parent
    for path in sorted(path for room in (*_ROOMS, *further) for path in (package / room).rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\n" + path.read_bytes())
    return digest.hexdigest()
