"""`wikitext2`, `c4`, `fineweb_edu`: the paper's text sets, streamed from the Hugging Face hub at a pinned revision."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

from evopress.data.repeats import without_repeats
from evopress.data.sources import Split, check_split
from evopress.errors import EvoPressError, reason_of

_WAY_OUT = "connect to the network, or use data=python_docs, or files of your own by data=text"


@dataclass(frozen=True)
class Part:
    """Every `step`-th document of a split on the hub, from `start` on; where several parts share it, each document counts once."""

    hub_split: str
    start: int = 0
    step: int = 1


@dataclass(frozen=True, kw_only=True)
class HubText:
    """A text set on the hub, its splits divided without overlap."""

    name: str
    repository: str
    revision: str
    """Commit, or a branch such as main that is resolved to a commit once."""
    parts: Mapping[Split, Part]
    subset: str | None = None
    data_files: Mapping[str, str] | None = None
    """The only files to read, by split on the hub."""
    wikitext: bool = False
    """Rows are lines of WikiText: articles are put together from them; the evaluation split is one document."""
    timeout_seconds: float = 20
    """Longest wait for the hub's first answer."""

    def documents(self, split: Split) -> Iterator[str]:
        """Yield the split's documents in the order of the hub.

        Raises: EvoPressError if the hub cannot be reached, has no such revision, or the stream breaks off.
        """
        check_split(split)
        part = self.parts[split]
        rows = self._rows(part.hub_split)
        if self.wikitext and split == "evaluation":
            yield "\n\n".join(rows)  # what perplexity is measured on: all rows, headings included
            return
        documents = articles(rows) if self.wikitext else rows
        yield from islice(without_repeats(documents) if part.step > 1 else documents, part.start, None, part.step)

    def identity(self) -> dict[str, Any]:
        """Return repository, commit and division. Asks the hub only if the revision is no commit."""
        return {
            "kind": self.name,
            "repository": self.repository,
            "revision": self.commit,
            "subset": self.subset,
            "data_files": dict(self.data_files) if self.data_files else None,
            "repeats": "once",
            "parts": {split: [part.hub_split, part.start, part.step] for split, part in sorted(self.parts.items())},
        }

    @cached_property
    def commit(self) -> str:
        """The commit that the revision names."""
        return self.revision if re.fullmatch(r"[0-9a-f]{40}", self.revision) else self._ask_hub()

    def _ask_hub(self) -> str:
        """Return the revision's commit; one bounded request, which also tells whether the hub can be reached."""
        for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            if os.environ.get(variable, "").lower() in ("1", "true", "yes", "on"):
                raise EvoPressError(f"data={self.name} is read from the hub but {variable} is set: {_WAY_OUT}")
        try:
            from huggingface_hub import HfApi
            from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
        except ImportError:
            raise EvoPressError(f"data={self.name} needs the package datasets: run `pip install datasets`") from None
        try:
            info = HfApi().dataset_info(self.repository, revision=self.revision, timeout=self.timeout_seconds)
        except (RepositoryNotFoundError, RevisionNotFoundError):
            raise EvoPressError(
                f"data={self.name}: the hub has no revision {self.revision!r} of {self.repository}: give a commit or a branch"
            ) from None
        except Exception as error:  # the errors of the HTTP client vary between versions of huggingface_hub
            raise EvoPressError(
                f"data={self.name} cannot reach {self.repository} on the hub ({reason_of(error)}): {_WAY_OUT}"
            ) from error
        return str(info.sha)

    def _rows(self, hub_split: str) -> Iterator[str]:
        try:
            from datasets import load_dataset
        except ImportError:
            raise EvoPressError(f"data={self.name} needs the package datasets: run `pip install datasets`") from None
        self._ask_hub()  # the stream itself would retry for minutes without a network
        try:
            rows = load_dataset(
                self.repository,
                name=self.subset,
                data_files=dict(self.data_files) if self.data_files else None,
                split=hub_split,
                revision=self.commit,
                streaming=True,
            )
            yield from (row["text"] for row in rows if row["text"] is not None)
        except Exception as error:  # datasets lets through errors of its readers and of the HTTP client
            raise EvoPressError(
                f"data={self.name}: reading {self.repository} from the hub failed ({reason_of(error)}): {_WAY_OUT}"
            ) from error


def articles(rows: Iterable[str]) -> Iterator[str]:
    """Put WikiText articles together from their rows, joined by blank lines; " = Title = " opens one."""
    article: list[str] = []
    for row in rows:
        if re.fullmatch(r" = [^=](.*[^=])? = \n", row) and any(article):
            yield "\n\n".join(article)
            article = []
        article.append(row)
    if any(article):
        yield "\n\n".join(article)


def wikitext2(*, revision: str = "b08601e04326c79dfdd32d625aee71d232d685c3") -> HubText:
    """Return WikiText-2 raw: train's articles in turn calibrate and search, the whole test split evaluates."""
    return HubText(
        name="wikitext2",
        repository="Salesforce/wikitext",
        subset="wikitext-2-raw-v1",
        revision=revision,
        wikitext=True,
        parts={"calibration": Part("train", 0, 2), "search": Part("train", 1, 2), "evaluation": Part("test")},
    )


def c4(*, revision: str = "1588ec454efa1a09f29cd18ddd04fe05fc8653a2") -> HubText:
    """Return C4 in English: the first training shard calibrates and searches, the first validation shard evaluates."""
    return HubText(
        name="c4",
        repository="allenai/c4",
        revision=revision,
        data_files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
        parts={"calibration": Part("train", 0, 2), "search": Part("train", 1, 2), "evaluation": Part("validation")},
    )


def fineweb_edu(*, revision: str = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9") -> HubText:
    """Return FineWeb-Edu's sample of 10 billion tokens, the paper's calibration set; rows in turn serve each split."""
    return HubText(
        name="fineweb_edu",
        repository="HuggingFaceFW/fineweb-edu",
        subset="sample-10BT",
        revision=revision,
        parts={"calibration": Part("train", 0, 3), "search": Part("train", 1, 3), "evaluation": Part("train", 2, 3)},
    )
