"""Text sources by name: what makes them, and what is said of one that is unknown, misused or no source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from evopress.data.sources import TEXT_SOURCES, make_source, text_digest
from evopress.errors import EvoPressError

GROUP = "evopress.text_sources"
STORIES = """
class Stories:
    name = "stories"

    def __init__(self, *, count=3):
        self.count = count

    def documents(self, split):
        return iter([f"story {i} of {split}" for i in range(self.count)])

    def identity(self):
        return {"kind": "stories", "count": self.count}


class NoSource:
    name = "nothing"
"""


def test_digest_sees_where_documents_end() -> None:
    assert len({text_digest(texts) for texts in (["ab", "c"], ["a", "bc"], ["abc"], ["ab", "c", ""])}) == 4


@pytest.mark.parametrize("name", ["python_docs", "text", "wikitext2", "c4", "fineweb_edu"])
def test_our_own_sources_say_what_they_are(name: str) -> None:
    source = make_source(name, {}, key="data.source")
    assert source.name == name == source.identity()["kind"]


def test_a_source_of_another_package_gets_its_options(install: Callable[..., Path]) -> None:
    install("stories", {"stories": "stories:Stories"}, STORIES, group=GROUP)
    assert TEXT_SOURCES.names()[-1] == "stories"
    source = make_source("stories", {"count": 2}, key="data.source")
    assert list(source.documents("search")) == ["story 0 of search", "story 1 of search"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("books", {}, r"^data\.source=books is unknown: choose one of python_docs, text, wikitext2, c4, fineweb_edu, .*stories$"),
        ("stories", {"size": 2}, r"^the text source stories does not accept .*\{'size': 2\} .*: its options are count=3$"),
        ("nothing", {}, r"^data\.source=nothing is no text source: it lacks documents, identity; choose another$"),
    ],
)
def test_what_cannot_be_made_is_one_sentence(
    name: str, options: dict[str, int], message: str, install: Callable[..., Path]
) -> None:
    install("stories", {"stories": "stories:Stories", "nothing": "stories:NoSource"}, STORIES, group=GROUP)
    with pytest.raises(EvoPressError, match=message):
        make_source(name, options, key="data.source")
