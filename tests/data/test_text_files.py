import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evopress.data.sources import SPLITS
from evopress.data.text_files import TextFiles
from evopress.errors import EvoPressError


def _jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def _documents(path, **settings):
    return list(TextFiles(calibration=(path,), **settings).documents("calibration"))


def test_each_kind_of_file_gives_its_documents(tmp_path):
    texts = ["first", "zweites, äöü", "third\nwith two lines"]
    (tmp_path / "a.txt").write_text(texts[1], encoding="utf-8")
    pq.write_table(pa.table({"body": texts, "n": [1, 2, 3]}), tmp_path / "a.parquet")
    assert _documents(tmp_path / "a.txt") == [texts[1]]
    assert _documents(_jsonl(tmp_path / "a.jsonl", texts)) == texts
    assert _documents(str(tmp_path / "a.parquet"), field="body") == texts


def test_files_follow_one_another_and_splits_keep_theirs(tmp_path):
    one, two, three = (_jsonl(tmp_path / f"{i}.jsonl", [f"{i}a", f"{i}b"]) for i in range(3))
    source = TextFiles(calibration=(two, one), evaluation=(three,))
    assert list(source.documents("calibration")) == ["1a", "1b", "0a", "0b"]
    assert list(source.documents("evaluation")) == ["2a", "2b"]


@pytest.mark.parametrize("copied", [False, True])
def test_shared_file_is_divided_without_overlap(tmp_path, copied):
    texts = [f"document {i}" for i in range(11)]
    path = _jsonl(tmp_path / "a.jsonl", texts)
    other = shutil.copy(path, tmp_path / "copy.jsonl") if copied else path
    source = TextFiles(calibration=(path,), search=(other,), evaluation=(path,))
    got = {split: list(source.documents(split)) for split in SPLITS}
    assert sorted(text for documents in got.values() for text in documents) == sorted(texts)
    assert [len(documents) for documents in got.values()] == [4, 4, 3]


def test_shared_txt_is_cut_at_paragraph_ends(tmp_path):
    paragraphs = [f"Paragraph {i} " + "word " * (i % 5) for i in range(40)]
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    source = TextFiles(calibration=(path,), search=(path,), evaluation=(path,))
    parts = [next(source.documents(split)) for split in SPLITS]
    assert "\n\n".join(parts).split("\n\n") == paragraphs
    assert max(map(len, parts)) < 1.3 * min(map(len, parts))


def test_shared_file_with_too_little_text_is_refused(tmp_path):
    path = tmp_path / "line.txt"
    path.write_text("one paragraph", encoding="utf-8")
    source = TextFiles(search=(path,), evaluation=(path,))
    with pytest.raises(EvoPressError, match="share"):
        list(source.documents("search"))


def test_wikitext_rows_are_joined_by_blank_lines(tmp_path):
    raw = " \n = Title = \n \n First paragraph\u2028 of it . \n"
    rows = ["", " = Title = \n", "", " First paragraph\u2028 of it . \n"]
    path = tmp_path / "wiki.txt"
    path.write_text(raw, encoding="utf-8")
    assert _documents(path, wikitext=True) == ["\n\n".join(rows)]
    assert _documents(path) == [raw]


def test_identity_follows_content_and_settings_but_not_the_folder(tmp_path):
    path = _jsonl(tmp_path / "a.jsonl", ["one", "two"])
    identity = TextFiles(search=(path,)).identity()
    json.dumps(identity)
    (tmp_path / "moved").mkdir()
    assert TextFiles(search=(shutil.copy(path, tmp_path / "moved"),)).identity() == identity
    assert TextFiles(search=(path,), field="body").identity() != identity
    assert TextFiles(search=(path,), evaluation=(path,)).identity() != identity
    _jsonl(path, ["one", "three"])
    assert TextFiles(search=(path,)).identity() != identity


def _write(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("absent.txt", None, "does not exist"),
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\n", "no text"),
        ("a.jsonl", b"\n\n", "no text"),
        ("a.txt", b"good \xff bad", "not UTF-8 at byte 5"),
        ("a.txt", b"\xef\xbb\xbfgood \xff bad", "not UTF-8 at byte 8"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', "not UTF-8 at byte 24"),
        ("a.jsonl", b'{"text": "x"}\n\nnot json\n', "line 3 .* no JSON object"),
        ("a.jsonl", b'{"text": "x"}\n["list"]\n', "line 2 .* no JSON object"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', "line 2 .* field 'text' .*body"),
        ("a.jsonl", b'{"text": 3}\n', "line 1 .* field 'text'"),
        ("a.csv", b"text\n", "suffix '.csv'"),
        ("a.parquet", b"PAR1 no table", "no readable Parquet"),
    ],
)
def test_bad_file_is_explained_in_one_sentence(tmp_path, name, content, sentence):
    path = tmp_path / name
    if content is not None:
        _write(path, content)
    with pytest.raises(EvoPressError, match=sentence) as caught:
        _documents(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_parquet_column_is_checked(tmp_path):
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(EvoPressError, match=r"no column 'text' .*body, n"):
        _documents(tmp_path / "a.parquet")
    with pytest.raises(EvoPressError, match="holds int64"):
        _documents(tmp_path / "a.parquet", field="n")


def test_split_without_files_and_file_listed_twice_are_refused(tmp_path):
    path = _jsonl(tmp_path / "a.jsonl", ["one"])
    with pytest.raises(EvoPressError, match="no files for the search split"):
        list(TextFiles(calibration=(path,)).documents("search"))
    with pytest.raises(EvoPressError, match="listed twice"):
        list(TextFiles(calibration=(path, path)).documents("calibration"))


LONG = [" ".join(f"{word}{place}" for place in range(14)) for word in ("ash", "birch", "cedar", "elm")]
SHORT = "\n\n".join(f"no {place}" for place in range(40))


def _split(files, split):
    try:
        return "\n\n".join(files.documents(split))
    except EvoPressError as error:
        if f"for the {split} split are duplicates" not in str(error):
            raise
        return ""


@pytest.mark.parametrize(
    ("name", "text"),
    [("as rows have it", "\n\n".join(LONG)), ("other line ends", "\n".join(LONG)), ("short", SHORT), ("one paragraph", LONG[0])],
)
def test_a_row_and_a_txt_of_one_text_are_not_in_two_splits(tmp_path, name, text):
    rows = _jsonl(tmp_path / "rows.jsonl", [text, "something else that is long enough to be compared with others, as one sees"])
    (tmp_path / "one.txt").write_text(text + "\n")
    for files in (
        TextFiles(calibration=(rows,), evaluation=(tmp_path / "one.txt",)),
        TextFiles(calibration=(tmp_path / "one.txt",), evaluation=(rows,)),
    ):
        here, there = (" ".join(_split(files, split).split()) for split in ("calibration", "evaluation"))
        text_ = " ".join(text.split())
        assert (text_ in here) != (text_ in there)


@pytest.mark.parametrize(("one", "other"), [("\n\n".join(LONG), "\n".join(LONG)), (SHORT, SHORT + "\n")])
def test_two_txt_of_one_text_that_are_cut_otherwise_are_not_in_two_splits(tmp_path, one, other):
    (tmp_path / "a.txt").write_text(one)
    (tmp_path / "b.txt").write_text(other)
    files = TextFiles(calibration=(tmp_path / "a.txt",), evaluation=(tmp_path / "b.txt",))
    assert _split(files, "calibration") == one and _split(files, "evaluation") == ""
    files = TextFiles(calibration=(tmp_path / "a.txt", tmp_path / "b.txt"))
    assert _split(files, "calibration") == one + "\n\n" + other, "one split may have both"


def test_what_a_row_has_inside_is_set_aside_in_a_txt(tmp_path):
    rows = _jsonl(tmp_path / "rows.jsonl", ["\n\n".join(LONG[1:3])])
    (tmp_path / "all.txt").write_text("\n\n".join(LONG))
    files = TextFiles(calibration=(tmp_path / "all.txt",), evaluation=(rows,))
    assert _split(files, "calibration") == "\n\n".join((LONG[0], LONG[3]))
    assert _split(files, "evaluation") == "\n\n".join(LONG[1:3])


def test_what_is_apart_from_a_txt_gives_way_to_it(tmp_path):
    (tmp_path / "all.txt").write_text("\n\n".join(LONG))
    rows = _jsonl(tmp_path / "rows.jsonl", ["\n\n".join(LONG[1:3]), "\n\n".join(LONG), SHORT])
    files = TextFiles(evaluation=(rows,), apart_from=TextFiles(calibration=(tmp_path / "all.txt",)))
    assert _split(files, "evaluation") == SHORT


def test_a_txt_of_several_splits_is_compared_too(tmp_path):
    (tmp_path / "all.txt").write_text("\n\n".join(LONG))
    (tmp_path / "cut.txt").write_text("\n".join(LONG))
    shared = {"calibration": (tmp_path / "all.txt",), "search": (tmp_path / "all.txt",)}
    other = "something else that is long enough to be compared with others, as one sees"
    rows = _jsonl(tmp_path / "rows.jsonl", ["\n\n".join(LONG), other])
    files = TextFiles(**shared, evaluation=(rows,))
    assert _split(files, "evaluation") == other and _split(files, "calibration") == "\n\n".join(LONG[:2])
    rows = _jsonl(tmp_path / "part.jsonl", ["\n\n".join(LONG[1:3])])
    files = TextFiles(**shared, evaluation=(rows,))
    assert [_split(files, split) for split in SPLITS] == [LONG[0], LONG[3], "\n\n".join(LONG[1:3])]
    files = TextFiles(**shared, evaluation=(tmp_path / "cut.txt",))
    assert _split(files, "evaluation") == ""
    files = TextFiles(calibration=(tmp_path / "cut.txt",), search=(tmp_path / "all.txt",), evaluation=(tmp_path / "all.txt",))
    assert _split(files, "search") == "" == _split(files, "evaluation")


@pytest.mark.parametrize(("txt", "row"), [("\n\n".join(LONG), "\n".join(LONG)), (SHORT, SHORT)])
def test_rows_that_are_a_whole_txt_are_apart_from_it(tmp_path, txt, row):
    (tmp_path / "all.txt").write_text(txt)
    rows = _jsonl(tmp_path / "rows.jsonl", [row, f"{LONG[0]}\n\nit stays\n\n{' '.join(LONG[1:])} too\n\n{LONG[3]} as well"])
    files = TextFiles(evaluation=(rows,), apart_from=TextFiles(search=(tmp_path / "all.txt",)))
    assert (
        "it stays" in _split(files, "evaluation")
        and "elm1" in _split(files, "evaluation")
        and row not in _split(files, "evaluation")
    )
    files = TextFiles(evaluation=(tmp_path / "all.txt",), apart_from=TextFiles(search=(rows,)))
    assert _split(files, "evaluation") == ""


def test_what_is_apart_from_rows_gives_way_to_those_that_they_are_dealt_as(tmp_path):
    """However these documents' own splits share them."""
    joined = _jsonl(tmp_path / "a.jsonl", ["\n".join(LONG[:2]), "\n".join(LONG[2:])])
    apart = _jsonl(tmp_path / "b.jsonl", ["\n\n".join(LONG[:2]), "\n\n".join(LONG[2:])])
    rest = [f"{each} and more" for each in LONG]
    (tmp_path / "t.txt").write_text("\n\n".join([*LONG, *rest]))
    rows = _jsonl(tmp_path / "e.jsonl", ["  ".join(LONG[:2]), "  ".join(LONG[2:]), "else"])
    own = TextFiles(calibration=(joined,), search=(apart,))
    files = TextFiles(evaluation=(tmp_path / "t.txt", rows), apart_from=own)
    assert _split(files, "evaluation") == "\n\n".join([*rest, "else"])


def test_nothing_gives_way_to_what_has_given_way_itself(tmp_path):
    rows = _jsonl(tmp_path / "rows.jsonl", ["\n\n".join(LONG[:3])])
    (tmp_path / "one.txt").write_text("\n".join(LONG[:3]))
    (tmp_path / "three.txt").write_text("\n\n".join(LONG[:3]))
    files = TextFiles(calibration=(rows,), search=(tmp_path / "one.txt",), evaluation=(tmp_path / "three.txt",))
    assert sum(bool(_split(files, split)) for split in SPLITS) == 1
