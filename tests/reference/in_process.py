"""Run the program, or a script of `experiments`, inside this process, and keep what it said: a process of its own takes seconds."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import os
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import evopress.__main__ as program

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Outcome:
    """How a run of the program ended."""

    code: int
    text: str
    """What it printed and logged."""

    @property
    def errors(self) -> list[str]:
        return [line for line in self.text.splitlines() if line.startswith("error: ")]


def invoke(*arguments: str, cache: Path, cwd: Path) -> Outcome:
    """Run `python -m evopress ARGUMENTS` in `cwd`; everything of the process that it touches is put back."""
    root = logging.getLogger()
    handlers, level, threads = root.handlers[:], root.level, torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        for variable in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(variable)
        patch.setenv("EVOPRESS_CACHE", str(cache))
        patch.setenv("NETRC", str(cache / "none"))
        patch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        patch.setattr(gc, "collect", lambda *_: 0)  # before every job, here of all that earlier tests have imported and keep
        try:
            return _run(lambda: program.main(), ["evopress", *arguments], cwd)
        finally:
            for handler in root.handlers:  # those of Hydra's log
                if handler not in handlers:
                    handler.close()
            root.handlers[:] = handlers
            root.setLevel(level)
            torch.set_num_threads(threads)


def run_script(module: str, *arguments: str) -> Outcome:
    """Run `python -m MODULE ARGUMENTS` in the clone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, module, raising=False)  # or runpy warns that it is there
        return _run(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True), [module, *arguments], ROOT)


def sketch(figure: Any, png: Path, svg: Path, *, salt: str) -> None:
    """Write a picture of one pixel and the title of a figure, in place of drawing it."""
    from PIL import Image

    Image.new("RGB", (1, 1)).save(png)
    svg.write_text("<svg>" + "".join(f"<!-- {text.get_text()} -->" for text in figure.texts) + "</svg>", encoding="utf-8")


def _run(call: Callable[[], object], argv: list[str], cwd: Path) -> Outcome:
    said, code = io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
        contextlib.chdir(cwd),
    ):
        patch.setattr(sys, "argv", argv)
        try:
            call()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return Outcome(code, said.getvalue())
