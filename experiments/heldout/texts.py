"""Text of other kinds than the calibration's, all of it out of packages that a run needs anyway.

    python -m experiments.heldout.texts FOLDER        # NAME.txt for each, 1 MB in all; to be carried to another machine

Code is the source of modules of Python's standard library. Chat and other languages are what lm-eval ships for its few-shot
prompts: questions with reasoned answers, as turns of chats, and exam questions of MMLU in translation.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from sysconfig import get_path

import yaml

from evopress.errors import EvoPressError
from evopress.files import write_bytes
from experiments.scripts import in_one_sentence

MODULES = ("argparse", "datetime", "tarfile", "inspect", "pickle", "zipfile", "difflib", "mailbox")
"""Long ones, of many authors and styles; the first fill the tokens that a run evaluates at `scale=mini`."""
LANGUAGES = {"german": "de", "french": "fr", "spanish": "es", "hindi": "hi"}
CHARACTERS = 150_000
"""Of each text, at most."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Takes functions that a task file names for nothing."""


_Loader.add_multi_constructor("!", lambda *_: None)


def _tasks() -> Path:
    spec = find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise EvoPressError("lm-eval is not installed: pip install 'lm-eval[hf]'")
    return Path(next(iter(spec.submodule_search_locations))) / "tasks"


def module(name: str) -> str:
    """Return the source of a module of the standard library."""
    return (Path(get_path("stdlib")) / f"{name}.py").read_text(encoding="utf-8")


def code() -> str:
    """Return modules of the standard library, one after the other."""
    return "\n\n".join(map(module, MODULES))


def chat() -> str:
    """Return questions and reasoned answers as turns of chats, a subject after the other."""
    prompts = json.loads((_tasks() / "mmlu" / "flan_cot_fewshot" / "_cot_prompts.json").read_text(encoding="utf-8"))
    chats = (text.partition("\n\n")[2].replace("Q: ", "User: ").replace("\nA: ", "\nAssistant: ") for text in prompts.values())
    return "\n\n".join(chats)


def exams(language: str) -> str:
    """Return exam questions with their possible answers, the right one last: "de", "fr"."""
    folder = _tasks() / "llama3" / "instruct" / f"mmlu_{language}"
    parts = []
    for path in sorted(folder.glob("mmlu_*_*.yaml")):
        for sample in yaml.load(path.read_text(encoding="utf-8"), _Loader).get("fewshot_config", {}).get("samples", []):
            choices = sample["input_choice_list"]
            lines = [sample["input_question"], *(f"{letter}. {choice}" for letter, choice in choices.items())]
            parts.append("\n".join([*lines, *(f"→ {choices[letter]}" for letter in sample["input_correct_responses"])]))
    if not parts:
        raise FileNotFoundError(folder)
    return "\n\n".join(parts)


def _exams_in(language: str) -> Callable[[], str]:
    return lambda: exams(language)


KINDS: Mapping[str, Callable[[], str]] = {
    "code": code,
    "chat": chat,
    **{name: _exams_in(language) for name, language in LANGUAGES.items()},
}


def write_texts(folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Write the texts that are not there yet; return their files by kind, and why there are no others.

    Returns: kind to path; kind to reason.
    """
    files, reasons = {}, {}
    folder.mkdir(parents=True, exist_ok=True)
    for kind, make in KINDS.items():
        path = folder / f"{kind}.txt"
        if not path.exists():
            try:
                text = make()[:CHARACTERS]
            except (EvoPressError, OSError, KeyError, ValueError, yaml.YAMLError) as error:
                reasons[kind] = f"this version of a package lacks its text ({type(error).__name__}: {error})"
                continue
            write_bytes(path, text.encode())
        files[kind] = path
    return files, reasons


@in_one_sentence()
def main() -> None:
    """Write the texts into the folder that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="to write to")
    folder = parser.parse_args().folder
    files, reasons = write_texts(folder)
    for kind, path in files.items():
        print(f"{kind}: {path}, {path.stat().st_size:,} bytes")
    for kind, reason in reasons.items():
        print(f"{kind}: left out, {reason}")


if __name__ == "__main__":
    main()
