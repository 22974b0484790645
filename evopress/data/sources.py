"""Where text comes from: the protocol every source keeps, the sources by name, and the names of their splits."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, Protocol, get_args

from evopress.errors import EvoPressError
from evopress.registry import Registry

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


HUB_TEXT = ("wikitext2", "c4", "fineweb_edu")
"""Sources that are read from the hub, at `data.revision`."""

TEXT_SOURCES: Registry[Callable[..., TextSource]] = Registry(
    "text source",
    {
        "python_docs": "evopress.data.python_docs:PythonDocs",
        "text": "evopress.data.text_files:TextFiles",
        **{name: f"evopress.data.hub:{name}" for name in HUB_TEXT},
    },
    group="evopress.text_sources",
)
"""What makes a source, by its name in `data.source` and `evaluation.data`; called with the source's options as keywords."""


def make_source(name: str, options: Mapping[str, Any], *, key: str) -> TextSource:
    """Make a text source.

    Args:
        options: what it is told, by keyword.
        key: the setting that names it: "data.source".

    Raises: EvoPressError if there is none of that name, it does not take these options, or it is no text source.
    """
    source: TextSource = TEXT_SOURCES.make(name, options, key=key, told_by="data.options")
    if lacking := [member for member in ("name", "documents", "identity") if not hasattr(source, member)]:
        raise EvoPressError(f"{key}={name} is no text source: it lacks {', '.join(lacking)}; choose another")
    return source


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
