"""`python_docs`: the language reference that ships inside every Python; English prose that needs no network."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from evopress.data.sources import SPLITS, Split, check_split, text_digest
from evopress.errors import EvoPressError

SHARES: dict[Split, float] = {"evaluation": 0.40, "calibration": 0.36, "search": 0.24}
"""By characters. Python 3.11 has some 91,000 SmolLM2 tokens in all, once repeated paragraphs are dropped."""
PARAGRAPH_CHARS = 60
"""Paragraphs of at least this many characters occur once in all splits together."""
DOCUMENT_CHARS = 200
"""Topics left with less than this, once repeated paragraphs are dropped, are dropped whole."""


@dataclass(frozen=True)
class PythonDocs:
    """The topics of `pydoc_data`, each in one split.

    The text changes between versions of Python, so results from different versions are not comparable.
    """

    @property
    def name(self) -> str:
        return "python_docs"

    def documents(self, split: Split) -> Iterator[str]:
        """Yield the topics of a split, longest first."""
        check_split(split)
        yield from self._splits[split]

    def identity(self) -> dict[str, Any]:
        """Return the version of Python and the SHA-256 of the text of each split."""
        return {
            "kind": self.name,
            "python": f"{sys.version_info.major}.{sys.version_info.minor}",
            "sha256": {split: text_digest(self._splits[split]) for split in SPLITS},
        }

    @cached_property
    def _splits(self) -> dict[Split, tuple[str, ...]]:
        try:
            from pydoc_data.topics import topics
        except ImportError:
            raise EvoPressError(
                f"the Python at {sys.executable} lacks its pydoc_data module, which data=python_docs reads: "
                "install the full standard library or give files of your own by data=text"
            ) from None
        return divide(topics)


def divide(topics: Mapping[str, str]) -> dict[Split, tuple[str, ...]]:
    """Put each topic into one split, with no paragraph of 60 characters or more in two of them.

    Topics are taken longest first, ties by name, so neither the order of the mapping nor the hash seed matters; each
    goes to the split furthest behind its share of the characters. Many topics are excerpts of longer ones: a paragraph
    (white space normalised) is kept only in the first topic that has it.
    """
    seen: set[str] = set()
    chars: dict[Split, int] = dict.fromkeys(SHARES, 0)
    splits: dict[Split, list[str]] = {split: [] for split in SHARES}
    for _, topic in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        document = _without_repeats(topic, seen)
        if len(document) < DOCUMENT_CHARS:
            continue
        split = min(SHARES, key=lambda split: chars[split] / SHARES[split])
        splits[split].append(document)
        chars[split] += len(document)
    return {split: tuple(documents) for split, documents in splits.items()}


def _without_repeats(topic: str, seen: set[str]) -> str:
    """Drop the long paragraphs that were seen before; adds the others to `seen`."""
    kept = []
    for paragraph in re.split(r"\n[ \t]*\n", topic.strip("\n")):
        words = " ".join(paragraph.split())
        if len(words) >= PARAGRAPH_CHARS:
            if words in seen:
                continue
            seen.add(words)
        kept.append(paragraph)
    return "\n\n".join(kept)
