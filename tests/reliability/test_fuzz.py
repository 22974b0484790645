"""Whatever is in a file that we read, it is a value or one sentence: random bytes, damaged files, and well-formed ones that lie."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from own_files import READERS, Reader, check

from evopress.data.text_files import TextFiles
from evopress.errors import EvoPressError
from evopress.files import seal

FEW_OR_MANY = pytest.mark.parametrize("count", [20, pytest.param(2000, marks=pytest.mark.slow)], ids=["few", "many"])


@pytest.fixture(params=READERS, ids=lambda reader: reader.name)
def whole(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Reader, Path, bytes]:
    """A reader, a folder with a whole file of it, and the file's bytes."""
    request.param.make(tmp_path)
    outcome = check(request.param.read, tmp_path)
    assert not isinstance(outcome, EvoPressError), outcome
    return request.param, tmp_path, (tmp_path / request.param.name).read_bytes()


def damaged(data: bytes, place: int, patch: bytes, cut: int) -> bytes:
    at = place % (len(data) + 1)
    return data[:at] + patch + data[at + cut :]


def for_any(count: int, strategies: dict[str, st.SearchStrategy[Any]], run: Callable[..., None]) -> None:
    """Call `run` with so many draws of the strategies."""
    settings(max_examples=count, deadline=None)(given(**strategies)(run))()


BYTES = {"data": st.binary(max_size=300)}
DAMAGE = {"place": st.integers(0, 10**6), "patch": st.binary(max_size=8), "cut": st.integers(0, 8)}


@FEW_OR_MANY
def test_any_bytes(whole: tuple[Reader, Path, bytes], count: int) -> None:
    reader, folder, _ = whole

    def run(data: bytes) -> None:
        (folder / reader.name).write_bytes(data)
        check(reader.read, folder)

    for_any(count, BYTES, run)


@FEW_OR_MANY
def test_any_damage(whole: tuple[Reader, Path, bytes], count: int) -> None:
    reader, folder, data = whole

    def run(place: int, patch: bytes, cut: int) -> None:
        (folder / reader.name).write_bytes(damaged(data, place, patch, cut))
        check(reader.read, folder)

    for_any(count, DAMAGE, run)


ODD: st.SearchStrategy[Any] = st.sampled_from(
    [
        *(
            -1,
            0,
            2,
            10**9,
            2**63,
            10**30,
            1.5,
            1e300,
            True,
            None,
            "",
            ".",
            "..",
            "/",
            "../../x",
            "/etc/passwd",
            "a\\b",
            "a\0b",
            "x" * 400,
        ),
        *("\ud800", "nan", [], {}, [[]], [None], {"": 0}, {"x": {}}, [1, 2, 3], [10**9, 10**9], {"state": {"state": -1}}),
    ]
)
JSON = st.recursive(
    ODD | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container with each of its keys."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield value, key
            yield from places(inner)


def changed(document: Any, place: int, value: Any, *, delete: bool) -> Any:
    document = copy.deepcopy(document)
    all_places = list(places(document))
    if not all_places:
        return value
    container, key = all_places[place % len(all_places)]
    if delete:
        del container[key]
    else:
        container[key] = value
    return document


@FEW_OR_MANY
def test_any_lie(whole: tuple[Reader, Path, bytes], count: int) -> None:
    """A value of a whole file is another one or is gone; where the file has a digest, it is that of the lie."""
    reader, folder, data = whole
    if reader.name == "genome.txt":
        pytest.skip("it is no JSON")
    lines = data.decode().splitlines() if reader.lines else [data.decode()]

    def run(place: int, value: Any, delete: bool) -> None:
        which = place % len(lines)
        document = changed(json.loads(lines[which]), place, value, delete=delete)
        if reader.sealed and isinstance(document, dict):
            document = seal(document)
        text = "\n".join([*lines[:which], json.dumps(document), *lines[which + 1 :], ""])
        (folder / reader.name).write_text(text, encoding="utf-8")
        check(reader.read, folder)

    for_any(3 * count, {"place": st.integers(0, 10**6), "value": JSON, "delete": st.booleans()}, run)


def make_text(path: Path) -> None:
    texts = ["first text", "zweiter äöü", "third\nof two lines", ""]
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts * 20, "n": list(range(80))}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text, "n": 1.5}) + "\n" for text in texts), encoding="utf-8")
    else:
        path.write_text("\n\n".join(texts), encoding="utf-8")


@pytest.fixture(params=[".txt", ".jsonl", ".parquet"])
def text(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"a{request.param}"
    make_text(path)
    assert not isinstance(check(read_text, path), EvoPressError)
    return path


def read_text(path: Path) -> list[str]:
    documents = [*TextFiles(calibration=(path,)).documents("calibration")]
    source = TextFiles(search=(path,), evaluation=(path,), wikitext=True)
    for document in [*documents, *source.documents("search"), *source.documents("evaluation")]:
        document.encode()  # what a tokenizer takes
    return documents


@FEW_OR_MANY
def test_text_of_any_bytes(text: Path, count: int) -> None:
    def run(data: bytes, head: bool) -> None:
        first = {".jsonl": b'{"text": "a"}\n', ".parquet": b"PAR1"}.get(text.suffix, b"") if head else b""
        text.write_bytes(first + data)
        check(read_text, text)

    of_json = JSON.map(lambda value: json.dumps({"text": value}).encode())
    for_any(3 * count, {"data": st.binary(max_size=300) | of_json, "head": st.booleans()}, run)


@FEW_OR_MANY
def test_text_with_any_damage(text: Path, count: int) -> None:
    data = text.read_bytes()

    def run(place: int, patch: bytes, cut: int) -> None:
        text.write_bytes(damaged(data, place, patch, cut))
        check(read_text, text)

    for_any(3 * count, DAMAGE, run)
