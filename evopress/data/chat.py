"""Chats as text: messages rendered by a chat template, the tokenizer's own or one of a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from evopress.errors import EvoPressError
from evopress.files import given_path
from evopress.json_files import clip

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUTO = "auto"
TODAY = datetime(2024, 7, 26)
"""The date for templates that tell it to the model, so that text is the same on any day: the one that Llama 3's falls back on."""


@dataclass(frozen=True)
class ChatTemplate:
    """Renders the messages of a chat, as `data.chat_template` says."""

    tokenizer: Callable[[], PreTrainedTokenizerBase]
    given: str | None = AUTO
    """"auto": the tokenizer's own; a file with a Jinja template; None: chats are refused."""

    def render(self, messages: list[dict[str, Any]], where: str) -> str:
        """Return a chat as one text, without the beginning of text that templates put there: sequences have their own.

        Args: where: names the row: "line 3 of a.jsonl".

        Raises: EvoPressError without a template, or for a chat that it does not take.
        """
        tokenizer = self.tokenizer()
        if self.template is None:
            raise EvoPressError(
                f"{where} is a chat, and "
                + ("data.chat_template is null" if self.given is None else "this tokenizer has no chat template")
                + ": set data.chat_template=FILE, or name a text field with data.field"
            )
        try:
            with _on_one_day():
                text = tokenizer.apply_chat_template(messages, tokenize=False, chat_template=self.template)
        except Exception as error:  # whatever a template raises
            reason = clip(str(error) or type(error).__name__).rstrip(". ")
            raise EvoPressError(
                f"{where} cannot be rendered by the chat template ({reason}): fix the row, or set another data.chat_template=FILE"
            ) from error
        return str(text).removeprefix(tokenizer.bos_token or "")

    @cached_property
    def template(self) -> str | None:
        """The template's source."""
        if self.given is None:
            return None
        if self.given == AUTO:
            template = self.tokenizer().chat_template
            return template.get("default") if isinstance(template, dict) else template
        path = given_path(self.given, "data.chat_template")
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise EvoPressError(f"data.chat_template={self.given} cannot be read ({reason}): give auto, or a file") from error

    @property
    def digest(self) -> str | None:
        """SHA-256 of the template and of the special tokens that it may print; None: there is no template."""
        if self.template is None:
            return None
        printed = json.dumps(self.tokenizer().special_tokens_map, sort_keys=True, default=str)
        return hashlib.sha256(f"{printed}\n{self.template}".encode()).hexdigest()


class _Clock(datetime):
    """A clock that has stopped."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
        return TODAY


@contextmanager
def _on_one_day() -> Iterator[None]:
    """Let templates take it for `TODAY`: transformers gives them a function that asks the clock, and takes no other for it."""
    from transformers.utils import chat_template_utils as templates

    clock = templates.datetime
    templates.datetime = _Clock
    try:
        yield
    finally:
        templates.datetime = clock
