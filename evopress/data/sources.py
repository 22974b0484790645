"""Where text comes from: the protocol every source keeps, and the names of its splits."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, Protocol, get_args

from evopress.errors import EvoPressError

Split = Literal["calibration", "search", "evaluation"]
SPLITS: tuple[Split, ...] = get_args(Split)
"""Hessians are made from the first, fitness is measured on the second, results are reported on the third."""


class TextSource(Protocol):
    """Text in three disjoint splits."""

    @property
    def name(self) -> str:
        """What tables and logs call it: "wikitext2"."""

    def documents(self, split: Split) -> Iterator[str]:
        """Yield the split's documents, the same ones in the same order every time.

        Raises: EvoPressError if the text cannot be had.
        """

    def identity(self) -> dict[str, Any]:
        """Return what decides the text, as values JSON can hold: kind, revision or SHA-256, settings."""


def streams_of(source: TextSource, split: Split, left_out: Counter[str]) -> Iterator[Iterable[str]]:
    """Yield a split's documents, each in pieces, and count what the source leaves out.

    A source of very long documents has a method `streams` of its own; each document is to be taken before the next.
    """
    streams: Callable[[Split, Counter[str]], Iterator[Iterable[str]]] | None = getattr(source, "streams", None)
    return streams(split, left_out) if streams else ((document,) for document in source.documents(split))


def check_split(split: str) -> None:
    """Raise EvoPressError unless this is the name of a split."""
    if split not in SPLITS:
        raise EvoPressError(f"split {split!r} does not exist: choose one of {', '.join(SPLITS)}")


def text_digest(texts: Iterable[str]) -> str:
    """Return the SHA-256 of texts, their number and borders included."""
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()
