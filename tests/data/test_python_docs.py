import os
import re
import subprocess
import sys

import pytest

from evopress.data.python_docs import PARAGRAPH_CHARS, SHARES, PythonDocs, divide
from evopress.data.sources import SPLITS
from evopress.errors import EvoPressError


def _long_paragraphs(documents: tuple[str, ...]) -> list[str]:
    paragraphs = (" ".join(p.split()) for document in documents for p in re.split(r"\n[ \t]*\n", document))
    return [paragraph for paragraph in paragraphs if len(paragraph) >= PARAGRAPH_CHARS]


def test_no_long_paragraph_occurs_twice_in_all_splits():
    source = PythonDocs()
    paragraphs = [p for split in SPLITS for p in _long_paragraphs(tuple(source.documents(split)))]
    assert len(paragraphs) > 1000
    assert len(set(paragraphs)) == len(paragraphs)


def test_splits_have_their_shares():
    source = PythonDocs()
    chars = {split: sum(map(len, source.documents(split))) for split in SPLITS}
    for split, share in SHARES.items():
        assert chars[split] / sum(chars.values()) == pytest.approx(share, abs=0.02)


def test_documents_are_the_same_whatever_the_hash_seed():
    code = "from evopress.data.python_docs import PythonDocs; print(PythonDocs().identity())"
    outputs = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        outputs.add(subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout)
    assert outputs == {f"{PythonDocs().identity()}\n".encode()}


def test_order_of_the_mapping_does_not_matter():
    topics = {f"topic{i}": f"Paragraph number {i} says something of its own. " * (5 + i % 7) for i in range(30)}
    assert divide(topics) == divide(dict(reversed(topics.items())))


def test_repeated_paragraph_stays_in_the_longest_topic():
    common = "This paragraph, of more than sixty characters, stands in both of the topics."
    topics = {
        "short": f"{common}\n\n{'Only the short topic says this. ' * 8}",
        "long": f"{'  '.join(common.split())}\n\n{'Only the long topic says this. ' * 20}",
    }
    splits = divide(topics)
    holders = [d for documents in splits.values() for d in documents if "both" in d]
    assert len(holders) == 1 and "Only the long" in holders[0]


def test_identity_tells_texts_apart(monkeypatch):
    before = PythonDocs().identity()
    from pydoc_data import topics

    monkeypatch.setitem(topics.topics, "added", "A topic that is not there otherwise, long enough to be kept. " * 10)
    assert PythonDocs().identity() != before


def test_missing_module_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(EvoPressError, match="data=text"):
        next(PythonDocs().documents("search"))


def test_unknown_split_is_refused():
    with pytest.raises(EvoPressError, match="'train'"):
        next(PythonDocs().documents("train"))
