"""Documents that repeat: each stands in one split alone, whatever files and kinds of files it is in."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

SET_ASIDE = -1
"""Owner of a document that repeats another."""
NOT_COMPARED = -2
"""Owner of what is too short to compare."""


class WholeKey:
    """64 bits of the digest of a text, which may come in paragraphs: texts that differ by white space alone share them."""

    def __init__(self) -> None:
        """Begin with none."""
        self._digest, self._between = hashlib.blake2b(digest_size=8), b""

    def add(self, paragraph: str) -> None:
        """Add a paragraph, which is not blank."""
        self._digest.update(self._between + " ".join(paragraph.split()).encode("utf-8", "surrogatepass"))
        self._between = b" "

    def __int__(self) -> int:
        return int.from_bytes(self._digest.digest())


def content_key(text: str) -> int:
    """Return a text's `WholeKey`."""
    whole = WholeKey()
    whole.add(text)
    return int(whole)


@dataclass
class Listed:
    """What a file has, in its order: keys, and for each the splits (bits of a mask) that it may go to."""

    in_turn: bool
    """Documents of this file are dealt to its splits in turn; else each already has its place (the parts of a .txt)."""
    keys: array[int] = field(default_factory=lambda: array("Q"))
    masks: array[int] = field(default_factory=lambda: array("B"))
    """0: too short to compare."""

    def add(self, key: int, mask: int) -> None:
        """Add a document, or a paragraph of a .txt."""
        self.keys.append(key)
        self.masks.append(mask)

    @property
    def arrays(self) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
        """Keys and masks."""
        return np.asarray(self.keys, np.uint64), np.asarray(self.masks, np.uint8)

    @property
    def compared(self) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
        """Keys and masks of what is compared."""
        keys, masks = self.arrays
        return keys[masks > 0], masks[masks > 0]


class Seen:
    """Keys, and the splits (bits of a mask) in which each has been seen."""

    def __init__(self, parts: Iterable[tuple[NDArray[np.uint64], NDArray[np.uint8]]]) -> None:
        """Take keys and masks."""
        keys, masks = zip(*parts, strict=True) if (parts := list(parts)) else ((np.empty(0, np.uint64),), (np.empty(0, np.uint8),))
        self._keys, places = np.unique(np.concatenate(keys), return_inverse=True)
        self._masks = np.zeros(len(self._keys), np.uint8)
        np.bitwise_or.at(self._masks, places, np.concatenate(masks))

    def splits(self, keys: NDArray[np.uint64]) -> NDArray[np.uint8]:
        """Return the splits of each of some keys: 0 for those that have not been seen."""
        if not len(self._keys):
            return np.zeros(len(keys), np.uint8)
        places = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        return np.where(self._keys[places] == keys, self._masks[places], np.uint8(0))


def deal(files: Mapping[str, Listed], *, first: int | None = None) -> dict[str, NDArray[np.int8]]:
    """Say which split each document goes to, by file and position; `SET_ASIDE` where it repeats one, `NOT_COMPARED`.

    What may go to one split alone stays there, repeats included. What may go to several, because a file is listed for several
    or because it is in several files, is dealt to them in turn, in the order of first appearance, and stands there once. What is
    in several parts of one .txt stays in the first of them.

    Args:
        files: by name, in the order in which documents appear.
        first: split that takes what may go to it before the others.
    """
    keys, masks, places = (
        np.concatenate([np.asarray(part, dtype) for part in parts] or [np.empty(0, dtype)])
        for parts, dtype in (
            ([listed.keys for listed in files.values()], np.uint64),
            ([listed.masks for listed in files.values()], np.uint8),
            ([np.full(len(listed.keys), i) for i, listed in enumerate(files.values())], np.int64),
        )
    )
    owners = np.array([(mask & -mask).bit_length() - 1 if mask else NOT_COMPARED for mask in range(256)], np.int8)[masks]
    compared = np.flatnonzero(masks)
    _, first_seen, content = np.unique(keys[compared], return_index=True, return_inverse=True)
    wanted, start, end = np.zeros(len(first_seen), np.uint8), places[compared[first_seen]], np.zeros(len(first_seen), np.int64)
    np.bitwise_or.at(wanted, content, masks[compared])
    np.maximum.at(end, content, places[compared])
    in_turn = np.array([listed.in_turn for listed in files.values()], bool)
    shared = np.array([mask.bit_count() > 1 for mask in range(256)])[wanted]
    several = shared & ((start != end) | in_turn[start])
    later = (shared & ~several)[content] & (masks[compared] != masks[compared[first_seen]][content])
    owners[compared[later]] = SET_ASIDE
    chosen = np.full(len(first_seen), SET_ASIDE, np.int8)
    order = np.flatnonzero(several)[np.argsort(first_seen[several], kind="stable")]
    label = start[order] * 256 + wanted[order]
    for group in np.unique(label):
        mask = int(group) % 256
        splits = [first] if first is not None and mask >> first & 1 else [i for i in range(8) if mask >> i & 1]
        chosen[order[label == group]] = np.resize(np.array(splits, np.int8), np.count_nonzero(label == group))
    decided = several[content]
    takes = decided & (masks[compared] >> chosen[content].clip(0).astype(np.uint8) & 1).astype(bool)
    owners[compared[decided]] = SET_ASIDE
    _, once = np.unique(content[takes], return_index=True)
    kept = compared[np.flatnonzero(takes)[once]]
    owners[kept] = chosen[content[takes][once]]
    ends = np.cumsum([len(listed.keys) for listed in files.values()])
    return dict(zip(files, np.split(owners, ends[:-1]), strict=True)) if files else {}


def without_repeats(texts: Iterable[str]) -> Iterator[str]:
    """Yield each text once, by its first appearance; white space does not count."""
    seen: set[int] = set()
    for text in texts:
        key = content_key(text)
        if key not in seen:
            seen.add(key)
            yield text
