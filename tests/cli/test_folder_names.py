"""`resume=` takes a folder by any name, and the command that is printed to go on is one that works (trials, section 12)."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from evopress import config as configuration
from evopress import run_folder
from evopress.launching import resume
from evopress.launching.command import Command
from evopress.launching.folders import named_for_hydra

NAMES = (
    *("x=y", "a,b", "q(1)", "it's", "br[1]", "two words", "имя", "日本語", "{a:b}", "a${b}", "\\${b}", "${now:%Y}", "'quoted'"),
    *(
        "~home",
        "null",
        "???",
        "true",
        "1e3",
        "1_0",
        "back\\slash",
        "ends\\",
        ' "',
        "new\nline",
        "tab\t",
        "#1",
        "a#b",
        "-m",
        "--help",
    ),
    *(" leading", "trailing ", "*", "$HOME", "`a`", "&&", "a:b", "a;b", "+x", "%(a)s"),
)
ANY_NAME = st.one_of(
    st.sampled_from(NAMES),
    st.text(
        st.one_of(st.sampled_from("\\'\"${}=,()[] :~#%\n\t.a1"), st.characters(exclude_characters="\0/", codec="utf-8")), min_size=1
    ),
).filter(lambda name: name not in (".", "..") and len(name.encode()) <= 200)


def composed(argument: str) -> Any:
    """Return the value that an argument gives its key, as Hydra composes it."""
    override = OverridesParser.create().parse_override(argument)
    return OmegaConf.create({"value": override.value()}).value


@given(st.text(st.characters(exclude_characters="\0", codec="utf-8")).filter(lambda text: text != "???"))
@example("a\\\\${b}")
@example("null")
@settings(max_examples=500, deadline=None)
def test_hydra_is_told_a_text_as_it_is(text: str) -> None:
    argument = configuration.override("key", text)
    assert str(composed(argument)) == text
    assert configuration.value_of(argument) == text


@given(ANY_NAME, st.booleans())
@example("\r", False)
@example(" ", True)
@settings(max_examples=100, deadline=None)
def test_any_folder_goes_on_by_the_command_that_is_printed(name: str, inside: bool) -> None:
    with tempfile.TemporaryDirectory() as root, contextlib.chdir(root):
        folder = Path(root, name, "run") if inside else Path(root, name)
        folder.mkdir(parents=True)
        (folder / ".hydra").mkdir()
        run_folder.keep_overrides(folder, ["bits=3", f"resume={name}", "stages=[search]"])
        words = shlex.split(resume.to_go_on(folder))
        assert words[:3] == ["python", "-m", "evopress"] and len(words) == 4
        for arguments in (words[3:], [f"resume={folder}"], ["seed=1", f"resume={folder}"]):
            found = resume.resumed_folder(arguments)
            assert found is not None and found.samefile(folder)
            told = resume.with_resumed(arguments, found)
            with named_for_hydra(Command(), told) as told:
                values = {argument.partition("=")[0]: composed(argument) for argument in told}
                assert Path(values["hydra.run.dir"]).samefile(folder) and "${" not in values["hydra.run.dir"]
            assert (values["bits"], values["hydra.mode"]) == (3, "RUN") and values["stages"] == ["search"]
            assert Path(str(values["resume"])).samefile(folder)
    assert not os.path.lexists(values["hydra.run.dir"])


@pytest.mark.parametrize("name", ["x=y", "a,b", "q(1)", "it's", "br[1]", "two words", "имя", "a${b}", "null", "~home", "new\nline"])
def test_a_run_goes_on_in_a_folder_by_any_name(name: str, finished: Any, evopress: Callable[..., Any], tmp_path: Path) -> None:
    folder = shutil.copytree(finished.folder, tmp_path / name / name)
    shutil.rmtree(folder / "checkpoint")
    outcome = evopress(f"resume={folder}", "stages=[export]")
    assert outcome.code == 0, outcome.text
    assert (folder / "checkpoint" / "model.safetensors").exists()
    assert run_folder.kept_overrides(folder)[:3] == ["+method=quant", "bits=3.5", "+debug=tiny"]
    assert tempfile.gettempdir() + "/evopress-" not in outcome.text  # nor the name that Hydra may know it by
