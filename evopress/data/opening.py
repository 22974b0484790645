"""The text of a run as token sequences: its own source in three splits, and further held-out sets; or what is there already."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from evopress.data.chat import ChatTemplate
from evopress.data.sources import HUB_TEXT, SPLITS, TEXT_SOURCES, Split, TextSource, make_source
from evopress.data.special_tokens import check_embedded, leading_ids
from evopress.data.text_files import TextFiles
from evopress.data.tokens import token_sequences
from evopress.errors import EvoPressError
from evopress.settings import DataSettings, EvaluationSettings, ModelSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class RunText:
    """Opens the text that a run is told to use, each split when it is first asked for."""

    def __init__(
        self,
        data: DataSettings,
        evaluation: EvaluationSettings,
        model: ModelSettings,
        *,
        tokenizer: Callable[[], PreTrainedTokenizerBase | None],
        embedding_rows: Callable[[], int | None],
        cache: Path,
    ) -> None:
        """Remember what is to be read; nothing is.

        Args:
            model: its sequence length, its separator and the rule for what sequences begin with are looked at.
            tokenizer: returns the model's tokenizer, when text is first read; None: there is none, so that tokens are counted as
                they are asked for, and zeros stand for them.
            embedding_rows: returns how many tokens the model's embedding has; None: it is not known.
            cache: folder that keeps token sequences from run to run.
        """
        self._data, self._evaluation, self._model = data, evaluation, model
        self._tokenizer, self._embedding_rows, self._cache = tokenizer, embedding_rows, cache
        self._read: dict[Split, set[bytes]] = {}

    def source(self, name: str) -> TextSource:
        """Return a text source by its name in `data.source` or `evaluation.data`."""
        key = "data.source" if name == self._data.source else "evaluation.data"
        if name not in TEXT_SOURCES and key == "evaluation.data":
            choices = ", ".join(choice for choice in TEXT_SOURCES if choice != "text")
            raise EvoPressError(f"evaluation.data {name!r} is unknown: choose among {choices}")
        return make_source(name, self._options(name), key=key)

    def _options(self, name: str) -> dict[str, Any]:
        """Return what the settings tell a source; those of `data` are the run's own source's."""
        data = self._data
        options = data.options if name == data.source else {}
        if name == "text":
            files: dict[str, Any] = {split: tuple(getattr(data, split)) for split in SPLITS}
            return {**files, "field": data.field, "wikitext": data.wikitext, "chat": self._chat, **options}
        if name in HUB_TEXT and name == data.source and data.revision:
            return {"revision": data.revision, **options}
        return options

    @cached_property
    def own_source(self) -> TextSource:
        """What calibrates, is searched on and, first of all held-out text, evaluates."""
        return self.source(self._data.source)

    @property
    def name(self) -> str:
        """What the run's own text is called."""
        return self.own_source.name

    @property
    def _chat(self) -> ChatTemplate:
        return ChatTemplate(cast("Callable[[], PreTrainedTokenizerBase]", self._tokenizer), self._data.chat_template)

    @cached_property
    def evaluation_sources(self) -> dict[str, TextSource]:
        """Where held-out text comes from, by data set, the run's own first.

        Raises: EvoPressError for a name that is unknown or given twice.
        """
        evaluation = self._evaluation
        sources = {self.own_source.name: self.own_source}
        sources |= {name: self.source(name) for name in evaluation.data if name not in sources}
        for name, path in evaluation.files.items():
            if name in sources:
                raise EvoPressError(f"evaluation.files has {name!r}, which is already the name of another data set: choose another")
            own = self.own_source if isinstance(self.own_source, TextFiles) else None
            sources[name] = TextFiles(
                evaluation=(path,),
                field=evaluation.field,
                field_key="evaluation.field",
                wikitext=name in evaluation.wikitext,
                chat=self._chat,
                apart_from=own,
            )
        return sources

    def check_files(self) -> None:
        """Raise EvoPressError if a text file is missing or empty, or one that is held out is trained on."""
        used: dict[str, str] = {}
        for name, source in self.evaluation_sources.items():
            if not isinstance(source, TextFiles):
                continue
            for split in ("calibration", "search"):
                used |= dict.fromkeys(source.digests(split), split)
            held_out = source.digests("evaluation") if source is not self.own_source else []
            if same := next((used[digest] for digest in held_out if digest in used), None):
                raise EvoPressError(f"evaluation.files has {name!r}, which is also a {same} file: give another one")

    @cached_property
    def leading_ids(self) -> tuple[int, ...]:
        """What every sequence begins with, by `model.bos`."""
        rule, tokenizer = self._model.bos, self._tokenizer()
        if tokenizer is None:
            return ()
        leading = leading_ids(tokenizer, rule)
        if leading:
            tokens = " ".join(tokenizer.convert_ids_to_tokens(list(leading)))
            logger.info("every sequence begins with %s (model.bos=%s; false leaves it out)", tokens, rule)
        return leading

    def tokens(self, split: Split, num_tokens: int, source: TextSource | None = None) -> Tensor:
        """Return token ids int64 [N, L] of a split of the run's own text, or of another source, of which fewer will do.

        Raises: EvoPressError as `token_sequences`, and for a token that the model's embedding lacks.
        """
        source, model, tokenizer = source or self.own_source, self._model, self._tokenizer()
        if tokenizer is None:
            return torch.zeros(num_tokens // model.sequence_length, model.sequence_length, dtype=torch.int64)
        sequences = token_sequences(
            source,
            split,
            tokenizer,
            sequence_length=model.sequence_length,
            num_tokens=num_tokens,
            cache_dir=self._cache / "tokens",
            separator=model.separator,
            bos="true" if self.leading_ids else "false",
            or_all=source is not self.own_source,
        )
        if len(sequences) < num_tokens // model.sequence_length:
            logger.info(
                "%s text (%s): all of it, %s tokens of %s that were asked for",
                split,
                source.name,
                f"{sequences.numel():,}",
                f"{num_tokens:,}",
            )
        if (rows := self._embedding_rows()) is not None:
            what = f"the {split} text ({source.name})"
            check_embedded(sequences, tokenizer, num_rows=rows, what=what, separator=model.separator)
        self._warn_of_shared(split, source.name, sequences)
        return sequences

    def _warn_of_shared(self, split: Split, name: str, sequences: Tensor) -> None:
        """Warn if sequences of a split are those of another one that was read: others' sources may not keep them apart."""
        rows = {blake2b(row.tobytes(), digest_size=8).digest() for row in sequences.numpy()}
        for other, theirs in self._read.items():
            if other != split and (count := len(rows & theirs)):
                logger.warning(
                    "%s of the %s sequences of the %s text (%s) are in the %s text, too: results on text that was seen before are "
                    "too good; let the source %s keep its splits apart",
                    f"{count:,}",
                    f"{len(rows):,}",
                    split,
                    name,
                    other,
                    name,
                )
        self._read.setdefault(split, set()).update(rows)

    @cached_property
    def calibration(self) -> Tensor:
        """Token ids int64 [N, L] that Hessians are made from."""
        return self.tokens("calibration", self._data.calibration_tokens)

    @cached_property
    def search(self) -> Tensor:
        """Token ids int64 [N, L] that the search draws its minibatches from."""
        return self.tokens("search", self._data.search_tokens)

    def after_search(self, num_tokens: int) -> Tensor:
        """Return text of the search split that no search draws from, right after what it does: what the stage refine decides by.

        Raises: EvoPressError if there is too little.
        """
        length, searched = self._model.sequence_length, len(self.search)
        count = num_tokens // length
        try:
            return self.tokens("search", (searched + count) * length)[searched:]
        except EvoPressError as error:
            raise EvoPressError(
                f"{error}; the search uses {searched * length} of them (data.search_tokens), the stage refine the "
                f"{count * length} after these (refine.tokens)"
            ) from error

    @cached_property
    def evaluation(self) -> dict[str, Tensor]:
        """Held-out text by data set, the run's own first."""
        count = self._data.evaluation_tokens
        return {name: self.tokens("evaluation", count, source) for name, source in self.evaluation_sources.items()}


class GivenText:
    """Token sequences that are there already; see `RunText`, whose place they take."""

    name: str = "given"
    leading_ids: tuple[int, ...] = ()

    def __init__(self, calibration: Tensor, search: Tensor | None = None, after_search: Tensor | None = None) -> None:
        """Take sequences, token ids int64 [N, L].

        Args:
            search: what a search draws its minibatches from; None: there will be none.
            after_search: what the stage refine decides by; None: there will be none.
        """
        self.calibration, self._search, self._after_search = calibration, search, after_search
        self.evaluation: dict[str, Tensor] = {}

    @property
    def search(self) -> Tensor:
        """Token ids int64 [N, L]."""
        assert self._search is not None, "no search text was given"
        return self._search

    def after_search(self, num_tokens: int) -> Tensor:
        """Return what was given.

        Raises: EvoPressError if nothing was: what comes after the search text is not known.
        """
        if self._after_search is None:
            raise EvoPressError(
                f"no text is left after the search text for refine.tokens={num_tokens}: lower data.search_tokens, or give more text"
            )
        return self._after_search

    def check_files(self) -> None:
        """Do nothing: there are no files."""
