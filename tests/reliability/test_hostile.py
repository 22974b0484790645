"""Files made to do harm: paths that lead elsewhere, sizes that fill memory, code in weights, markup in names."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from own_files import SPACE, make_baselines, make_config, make_database, make_hessians, make_search
from safetensors.torch import load_file, save_file

from evopress.data.text_files import TextFiles
from evopress.errors import EvoPressError
from evopress.files import seal, sha256_file
from evopress.json_files import MAX_DEPTH, load_json, parse_json
from evopress.levels.build import _finished_blocks
from evopress.levels.hessians import HessianStore
from evopress.levels.store import MANIFEST, DamagedDatabaseError, LevelDatabase
from evopress.models.loading import find_weights, load_pretrained, pick_device, safe_name
from evopress.reporting.page import write_page
from evopress.reporting.records import read_genome, read_json
from evopress.reporting.report import write_report
from evopress.stages.baselines import read_baselines
from evopress.units import Level, Space, Unit

ELSEWHERE = [
    "/etc/passwd",
    "../block-000.safetensors",
    "..",
    ".",
    "",
    "a/b",
    "..\\block-000.safetensors",
    "C:\\x",
    "a\0b",
    "x" * 300,
]


def rewrite(path: Path, change: Callable[[Any], None], *, sealed: bool = True) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(seal(document) if sealed else document), encoding="utf-8")


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_manifest_names_no_file_elsewhere(name: str, tmp_path: Path) -> None:
    make_database(tmp_path)
    rewrite(tmp_path / MANIFEST, lambda manifest: manifest["files"][0].update(file=name))
    with pytest.raises(DamagedDatabaseError, match=re.escape(MANIFEST)):
        LevelDatabase.open(tmp_path)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_journal_names_no_file_elsewhere(name: str, tmp_path: Path) -> None:
    make_database(tmp_path, journal=True)
    path = tmp_path / "journal.jsonl"
    first, second = path.read_text(encoding="utf-8").splitlines()
    path.write_text(json.dumps(seal(json.loads(first) | {"file": name})) + "\n" + second + "\n", encoding="utf-8")
    assert list(_finished_blocks(tmp_path, 2)) == [1]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_baselines_name_no_folder_elsewhere(name: str, tmp_path: Path) -> None:
    make_baselines(tmp_path)
    rewrite(tmp_path / "baselines.json", lambda stored: stored.update(further=[name]))
    with pytest.raises(EvoPressError, match=r"names the level databases .* remove it"):
        read_baselines(tmp_path / "baselines.json")


@pytest.mark.parametrize("name", ELSEWHERE)
def test_an_index_of_weights_names_no_file_elsewhere(name: str, tmp_path: Path) -> None:
    make_config(tmp_path)
    rewrite(tmp_path / "model.safetensors.index.json", lambda index: index["weight_map"].update({"layers.0": name}), sealed=False)
    with pytest.raises(EvoPressError, match="no safetensors file of"):
        find_weights(tmp_path)


@pytest.mark.parametrize("name", [*ELSEWHERE, "layers.0.up\n"])
def test_a_unit_has_no_path_for_a_name(name: str, tmp_path: Path) -> None:
    make_database(tmp_path)
    rewrite(tmp_path / MANIFEST, lambda manifest: manifest["units"][0].update(name=name))
    with pytest.raises(DamagedDatabaseError):
        LevelDatabase.open(tmp_path).read(0, 0)
    make_search(tmp_path)
    rewrite(tmp_path / "genome.json", lambda genome: genome["units"][0].update(name=name), sealed=False)
    with pytest.raises(EvoPressError, match="no unit here"):
        read_genome(tmp_path / "genome.json", SPACE)


@pytest.mark.parametrize("make", [make_database, make_hessians])
def test_a_link_out_of_the_folder_is_not_followed(make: Callable[[Path], None], tmp_path: Path) -> None:
    folder, outside = tmp_path / "database", tmp_path / "outside.safetensors"
    folder.mkdir()
    make(folder)
    (folder / "block-000.safetensors").rename(outside)
    (folder / "block-000.safetensors").symlink_to(outside)
    if make is make_hessians:
        assert 0 not in HessianStore(folder)
        return
    with pytest.raises(DamagedDatabaseError, match="link"):
        LevelDatabase.open(folder)
    linked = tmp_path / "linked"
    linked.symlink_to(folder)  # the folder itself may lie on another disk
    (folder / "block-000.safetensors").unlink()
    shutil.copy(outside, folder / "block-000.safetensors")
    LevelDatabase.open(linked)


def crafted(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], None], lie: Callable[[Any], None] = lambda manifest: None
) -> None:
    """Change a database's first block, and let the manifest's digests be those of the change."""
    make_database(folder)
    path = folder / "block-000.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)

    def fit(manifest: Any) -> None:
        manifest["files"][0].update(bytes=path.stat().st_size, sha256=sha256_file(path))
        lie(manifest)

    rewrite(folder / MANIFEST, fit)


KEY = "layers.0.up/4/"


def absurd(rows: int, columns: int) -> Callable[[Any], None]:
    def lie(manifest: Any) -> None:
        unit = manifest["units"][0]
        unit["size"] = rows * columns
        for level in unit["levels"]:
            level["meta"]["shape"] = [rows, columns]

    return lie


LIES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], Callable[[Any], None]]] = {
    "a tensor is missing": (lambda t: t.pop(f"{KEY}zeros"), lambda m: None),
    "all tensors are missing": (lambda t: [t.pop(name) for name in list(t) if name.startswith(KEY)], lambda m: None),
    "a tensor too many": (lambda t: t.update({f"{KEY}more": torch.zeros(3)}), lambda m: None),
    "codes are too short": (lambda t: t.update({f"{KEY}codes": t[f"{KEY}codes"][:-1].clone()}), lambda m: None),
    "codes are of another dtype": (lambda t: t.update({f"{KEY}codes": t[f"{KEY}codes"].to(torch.int64)}), lambda m: None),
    "scales are of another shape": (lambda t: t.update({f"{KEY}scales": torch.zeros(6, 5, dtype=torch.float16)}), lambda m: None),
    "scales have no columns": (lambda t: t.update({f"{KEY}scales": torch.zeros(6, 0, dtype=torch.float16)}), lambda m: None),
    "zeros are of another dtype": (lambda t: t.update({f"{KEY}zeros": t[f"{KEY}zeros"].float()}), lambda m: None),
    "a shape of a terabyte": (lambda t: None, absurd(2**20, 2**20)),
    "the shape turned": (lambda t: None, absurd(3, 31)),
}


@pytest.mark.parametrize("case", LIES)
def test_a_block_that_is_not_as_the_manifest_says(case: str, tmp_path: Path) -> None:
    change, lie = LIES[case]
    crafted(tmp_path, change, lie)
    database = LevelDatabase.open(tmp_path)
    with pytest.raises(DamagedDatabaseError, match=r"block-000\.safetensors"):
        database.read(0, 0)


def meta(**changes: Any) -> Callable[[Any], None]:
    return lambda manifest: manifest["units"][0]["levels"][0]["meta"].update(changes)


@pytest.mark.parametrize(
    "lie",
    [
        *(meta(shape=shape) for shape in ([2**40, 2**40], [-6, -16], [96], [6.0, 16.0], "6x16", [True, 96], [0, 0], None)),
        *(meta(bits=bits) for bits in (0, 9, 64, -1, 4.0, "4", None)),
        *(meta(dtype=dtype) for dtype in ("int8", None, "torch.load")),
        meta(dtype=[]),
    ],
)
def test_numbers_of_a_manifest_are_checked_before_anything_is_made_of_them(lie: Callable[[Any], None], tmp_path: Path) -> None:
    crafted(tmp_path, lambda tensors: None, lie)
    with pytest.raises(DamagedDatabaseError, match=re.escape(MANIFEST)):
        LevelDatabase.open(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        *(
            struct.pack("<Q", len(text)) + text
            for text in (
                b'{"layers.0.up/4/codes":{"dtype":"U8","shape":[1099511627776,1099511627776],"data_offsets":[0,48]}}',
                b'{"layers.0.up/4/codes":{"dtype":"U8","shape":[4000000000],"data_offsets":[0,4000000000]}}',
                b'{"layers.0.up/4/codes":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}',
            )
        ),
    ],
)
def test_a_header_that_promises_what_the_file_has_not(header: bytes, tmp_path: Path) -> None:
    make_database(tmp_path)
    path = tmp_path / "block-000.safetensors"
    path.write_bytes(header + bytes(64))
    entry = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    rewrite(tmp_path / MANIFEST, lambda manifest: manifest["files"][0].update(entry))
    with pytest.raises(DamagedDatabaseError, match=r"block-000\.safetensors"):
        LevelDatabase.open(tmp_path).read(0, 0)


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size"])
@pytest.mark.parametrize("value", [10**12, 0, -1, "2", 2.5, True, []])
def test_sizes_that_no_model_has(key: str, value: Any, tmp_path: Path) -> None:
    make_config(tmp_path)
    rewrite(tmp_path / "config.json", lambda config: config.update({key: value}), sealed=False)
    with pytest.raises(EvoPressError, match=rf"config\.json has {key}=.*expected a whole number"):
        find_weights(tmp_path)


NOT_STRICT = {
    b'{"a": NaN}': "NaN",
    b'{"a": -Infinity}': "Infinity",
    b'{"a": 1e999}': "too large a number",
    b'{"a": 1, "a": 2}': "'a' is there twice",
    b'{"\\u0061": 1, "a": 2}': "'a' is there twice",
    b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1): "levels deep",
    b'{"a":' * (MAX_DEPTH + 1) + b"1" + b"}" * (MAX_DEPTH + 1): "levels deep",
    b"[" * 5_000_000: "levels deep",
    b"[" + b"[]," * 3_000_000 + b"[]]": "more than 5000000 values",
    b"1" * 5000: "not valid JSON",
    b'"\xff"': "not UTF-8",
    b"": "not valid JSON",
}


@pytest.mark.parametrize("text", NOT_STRICT, ids=lambda text: repr(text[:16]))
def test_json_is_strict_and_bounded(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(EvoPressError, match=re.escape(NOT_STRICT[text])):
        read_json(tmp_path / "a.json")


def test_brackets_in_strings_are_no_depth() -> None:
    text = json.dumps(["[" * 1000, '\\"[{', {"]": "}" * 1000}, [[["\\"]]]] * 30).encode()
    assert parse_json(text, "text") == json.loads(text)
    deep = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    assert parse_json(deep, "text") == json.loads(deep)


def test_a_file_larger_than_its_kind_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "a.json", "wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(EvoPressError, match="larger than 1 MB, which no list is"):
        load_json(tmp_path / "a.json", limit=2**20, what="list")


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is kept on Linux")
def test_reading_stays_within_memory(tmp_path: Path) -> None:
    """Files that would take gigabytes as objects, in a process that may have one."""
    many = tmp_path / "many.json"
    many.write_bytes(b"[" + b"{}," * (20 * 2**20) + b"{}]")
    deep = tmp_path / "deep.json"
    deep.write_bytes(b"[" * (64 * 2**20))
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
        "from evopress.errors import EvoPressError\n"
        "from evopress.json_files import load_json\n"
        "for path in sys.argv[1:]:\n"
        "    try: load_json(path)\n"
        "    except EvoPressError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(many), str(deep)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "values" in done.stdout and "deep" in done.stdout


@settings(max_examples=200, deadline=None)
@given(
    name=st.text(max_size=400)
    | st.sampled_from(["CON", "nul.txt", "com1", "..", ".", "", "../../x", "a" * 300, "\\\\host\\x", "-rf"])
)
def test_a_models_name_stays_in_its_folder(name: str) -> None:
    safe = safe_name(name)
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}", safe), safe
    assert Path("/root", safe).resolve().parent == Path("/root")
    assert safe.split(".")[0].lower() not in {
        "con",
        "prn",
        "aux",
        "nul",
        *(f"com{i}" for i in range(10)),
        *(f"lpt{i}" for i in range(10)),
    }
    assert safe_name(safe) == safe


def test_long_names_that_begin_alike_stay_apart() -> None:
    assert safe_name("a" * 300) != safe_name("a" * 301)


@pytest.mark.parametrize("path", [".", ".."])
def test_a_checkpoint_in_the_working_folder_has_its_folders_name(
    path: str, tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_folder()
    (folder / "inside").mkdir(exist_ok=True)
    monkeypatch.chdir(folder if path == "." else folder / "inside")
    assert load_pretrained(Path(path)).name == safe_name(folder.name)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "weights.pkl"])
def test_pickled_weights_are_refused_and_say_how_to_convert(name: str, tmp_path: Path) -> None:
    make_config(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch harmed'\ntR.")
    with pytest.raises(EvoPressError, match=rf"{re.escape(name)}.*can run code.*safe_serialization=True"):
        find_weights(tmp_path)


def test_code_beside_the_weights_does_not_run_unless_asked_for(
    tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, harmed = tmp_path / "model", tmp_path / "harmed"
    shutil.copytree(tiny_folder(), folder, ignore=shutil.ignore_patterns("inside"))
    (folder / "evil.py").write_text(f"open({str(harmed)!r}, 'w')\n", encoding="utf-8")
    for name, classes in (
        ("config.json", {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "evil.Tokenizer"]}),
    ):
        rewrite(folder / name, lambda config, classes=classes: config.update(auto_map=classes), sealed=False)  # type: ignore[misc]
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    load_pretrained(folder)
    assert not harmed.exists()


@pytest.mark.parametrize("device", ["meta", "mps", "xla", "fpga"])
def test_devices_that_nothing_is_tested_on(device: str) -> None:
    with pytest.raises(EvoPressError, match="use auto, cpu, cuda or cuda:N"):
        pick_device(device)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"text": "\\ud800"}\n', "surrogate"),
        (b'{"text": ' + b"[" * 100_000 + b"\n", "line 1 .* no JSON object"),
        (b'{"x\\n' + b"y" * 5000 + b'": 1}\n', "its fields: x "),
    ],
)
def test_lines_of_text_that_are_made_to_confuse(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(EvoPressError, match=words) as caught:
        list(TextFiles(calibration=(path,)).documents("calibration"))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(EvoPressError, match="not an ordinary file"):
        read_json(tmp_path / "a.json")
    with pytest.raises(EvoPressError, match="does not exist"):
        list(TextFiles(calibration=(tmp_path / "a.txt",)).documents("calibration"))


EVIL = "</style></title><script>alert(1)</script><img src=x onerror=alert(1)>\"' onload='x' javascript:alert(1) [a](javascript:x)"


class Elements(HTMLParser):
    """The elements of a page, with their attributes but for the pictures' data."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[tuple[str, str | None], ...]]] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, tuple((key, None if key in ("src", "alt") else value) for key, value in attrs)))


def report(path: Path, word: str) -> str:
    """Write the report of a run whose every name is `word`, and return its source."""
    units = tuple(
        Unit(f"{word}.{i}", i, word, 96, tuple(Level(f"{word} {bits}", bits * 96, f"{bits}", bits * 96) for bits in (4, 3, 2)))
        for i in range(4)
    )
    row = {"name": word, "kl": 0.5, "bits_per_weight": 3.0, "perplexity": {word: 3.0}, "zero_shot": {word: 0.5}}
    record = {
        "schema": 1,
        "generation": 1,
        "genome": [1, 1, 1, 1],
        "fitness": 0.1,
        "parent_fitness": 0.2,
        "accepted": True,
        "seconds": 1.0,
        "switches": [[0, 2, 1], [1, 0, 1]],
        "tokens": 64,
        "evaluations": 4,
        "cost": 1152,
        "held_out": {"kl": 0.3, "perplexity": {word: 3.0}},
        "stages": [{"tokens": 64, "num_candidates": 2, "fitnesses": [0.1, 0.2], "survivors": [0]}],
    }
    write_report(
        path,
        title=word,
        config={"model": {"name": word}, "method": {"name": word}, "data": {"source": word}, "bits": 3.0, word: word, "seed": word},
        result={
            "rows": [row, {**row, "name": "evopress"}],
            "database": {"path": word, "bytes": 5, "seconds": 1.0},
            "checkpoint": word,
        },
        records=[{**record, "generation": 0, "accepted": False, "switches": []}, record],
        space=Space("quant", units),
        genome=(1, 1, 1, 1),
        figures=[],
        command=word,
        environment={word: word, "git_revision": word},
    )
    return path.read_text(encoding="utf-8")


def test_no_name_makes_markup(tmp_path: Path) -> None:
    """The page of a run full of markup has the very elements and attributes that a harmless one has."""
    plain, evil = report(tmp_path / "plain.html", "plain"), report(tmp_path / "evil.html", EVIL)
    assert Elements(evil).found == Elements(plain).found
    assert evil.count("alert(1)") > 20
    assert "<script" not in evil and evil.count("</style>") == plain.count("</style>") == 1
    write_page(tmp_path / "page.html", title=EVIL, parts=[])
    assert "<script" not in (tmp_path / "page.html").read_text(encoding="utf-8")
