"""The texts that depth pruning looks at, each kind in parts that share nothing: one for each seed, and one held out.

    python -m experiments.calibration.texts FOLDER        # KIND-SEED.jsonl and KIND-held-out.jsonl, to be carried elsewhere

Prose and code are Python's own, exam questions come out of lm-eval; random tokens are drawn evenly from the default model's
vocabulary and written as text, none of them held out.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from evopress.data.python_docs import PythonDocs
from evopress.data.sources import SPLITS
from evopress.errors import EvoPressError
from evopress.files import write_bytes
from experiments.heldout.texts import LANGUAGES, MODULES, exams, module
from experiments.scripts import in_one_sentence

TEXTS = Path("multirun/calibration/texts")
SEEDS = 3
PIECE = 2_000
"""Characters of a piece of text at least; it ends where a paragraph does."""
SHARE = 0.25
"""Of each text that is held out, its beginning."""
RANDOM_TOKENS = 100_000


def docs() -> list[str]:
    """Return the topics of Python's language reference, one text."""
    return ["\n\n".join(topic for split in SPLITS for topic in PythonDocs().documents(split))]


def code() -> list[str]:
    """Return modules of the standard library."""
    return [module(name) for name in MODULES]


def exam_questions() -> list[str]:
    """Return exam questions with four answers in German, French and Spanish."""
    return [exams(language) for name, language in LANGUAGES.items() if name != "hindi"]


def random() -> list[str]:
    """Return words of random tokens of the default model, in pieces."""
    from transformers import AutoTokenizer

    from evopress.models.opening import find_model
    from evopress.settings import ModelSettings

    cache = Path(os.environ.get("EVOPRESS_CACHE") or "~/.cache/evopress").expanduser()
    tokenizer = AutoTokenizer.from_pretrained(find_model(ModelSettings(builtin="smollm2_135m"), cache))
    special = set(tokenizer.all_special_ids)
    known = [token for token in range(tokenizer.vocab_size) if token not in special]
    drawn = np.random.default_rng(0).choice(known, RANDOM_TOKENS)
    return ["\n\n".join(tokenizer.decode(part).replace("\n\n", "\n") for part in drawn.reshape(-1, 500))]


KINDS: Mapping[str, Callable[[], Sequence[str]]] = {"docs": docs, "code": code, "exams": exam_questions, "random": random}
HELD_OUT = ("docs", "code", "exams")
"""Kinds that genomes are measured on."""


def pieces(text: str) -> list[str]:
    """Cut a text at ends of paragraphs."""
    found = [""]
    for paragraph in text.split("\n\n"):
        if len(found[-1]) >= PIECE:
            found.append("")
        found[-1] += f"{paragraph}\n\n"
    return found


def parts(texts: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Divide a kind's texts: the beginning of each is held out, the rest is dealt to the seeds, piece by piece.

    Returns: what is held out, and what each seed has.
    """
    held_out: list[str] = []
    rest: list[str] = []
    for text in texts:
        cut = pieces(text)
        held_out += cut[: int(SHARE * len(cut))]
        rest += cut[int(SHARE * len(cut)) :]
    return held_out, [rest[seed::SEEDS] for seed in range(SEEDS)]


def write_texts(folder: Path) -> None:
    """Write the texts that are not there yet.

    Raises: EvoPressError if a package lacks a text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for kind, make in KINDS.items():
        names = [*(f"{kind}-{seed}" for seed in range(SEEDS)), f"{kind}-held-out"]
        if all((folder / f"{name}.jsonl").is_file() for name in names):
            continue
        try:
            held_out, of_seeds = parts(make())
        except (OSError, KeyError, ValueError) as error:
            raise EvoPressError(
                f"the text of kind {kind} is not in this version of a package ({type(error).__name__}: {error}): carry the files "
                f"that `python -m experiments.calibration.texts FOLDER` writes elsewhere to {folder}"
            ) from error
        for name, documents in zip(names, [*of_seeds, held_out], strict=True):
            lines = "".join(json.dumps({"text": document}) + "\n" for document in documents)
            write_bytes(folder / f"{name}.jsonl", lines.encode())


@in_one_sentence()
def main() -> None:
    """Write the texts into the folder that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="to write to")
    folder = parser.parse_args().folder
    write_texts(folder)
    for path in sorted(folder.glob("*.jsonl")):
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
