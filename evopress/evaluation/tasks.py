"""Zero-shot tasks of lm-eval: found by name, their questions loaded, and looked at before any model answers them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import random
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from evopress.data.special_tokens import ids_beyond, leading_ids, not_embedded
from evopress.errors import EvoPressError, reason_of
from evopress.json_files import clip

PAPER_TASKS = ("arc_challenge", "arc_easy", "hellaswag", "piqa", "winogrande")
_LOCAL = "_local"
_LOOKED_AT = 200
"""Questions of a task, where only their lengths matter."""
_NOISY = ("lm_eval", "datasets", "evaluate", "huggingface_hub", "httpx", "httpx2", "urllib3", "fsspec")


def load_tasks(tasks: Sequence[str], *, tasks_path: str | None = None) -> dict[str, Any]:
    """Return lm-eval's tasks by the names asked for, their questions loaded.

    Args:
        tasks: lm-eval's names of multiple-choice tasks, or of groups of them whose accuracy is that of all their questions, such as
            mmlu. Local ones may be named without their ending "_local".
        tasks_path: folder that the tasks are read from: lm-eval's task files, in it or below. Their data files are found as
            `lm_eval --include_path` finds them, relative to the working directory; where they are not there, relative to the
            folder, and at last to the task file. None: lm-eval's own tasks, whose questions come from the hub.

    Raises: EvoPressError if lm-eval is not installed, the folder or a task does not exist, a task is not one of choices scored by
        accuracy, or its questions cannot be read.
    """
    root = None if tasks_path is None else Path(tasks_path).expanduser().resolve()
    if root is not None and not root.is_dir():
        raise EvoPressError(f"evaluation.tasks_path={tasks_path} is no folder: give one with lm-eval task files (.yaml)")
    with undisturbed():
        try:
            import lm_eval
            import lm_eval.models.huggingface
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise EvoPressError(f"evaluation.tasks needs lm-eval ({error}): run `pip install 'lm-eval[hf]'`") from error
        own = Path(lm_eval.__file__).parent / "tasks"
        folders = [root] if root is not None else sorted({path.parent for path in _task_files(own, tasks).values()})
        manager = TaskManager(include_path=folders, include_defaults=False)
        there = {*manager.all_subtasks, *manager.all_groups}
        names = {task: f"{task}{_LOCAL}" if root and task not in there else task for task in tasks}
        loaded: dict[str, Any] = {}
        for task, name in names.items():
            if name not in there:  # local ones, or gone since `_task_files` looked
                known = ", ".join([*manager.all_subtasks, *manager.all_groups]) or "none"
                raise EvoPressError(
                    f"evaluation.tasks has {task!r}, which is not among the task files in {root or own}: it has {known}"
                )
            try:
                with contextlib.chdir(Path.cwd() if root is None else _data_folder(manager.task_index[name].yaml_path, root)):
                    found = manager.load([name])
            except Exception as error:  # of datasets, the hub's client, the template, the YAML
                source = f"the folder {root}" if root else "the hub"
                way_out = "check its task and data files" if root else "check the network, or give evaluation.tasks_path=FOLDER"
                raise EvoPressError(
                    f"the questions of task {task!r} cannot be loaded from {source} ({reason_of(error)}): {way_out}"
                ) from error
            if not all(map(_counts_right_answers, found["tasks"].values())):
                raise EvoPressError(
                    f"evaluation.tasks has {task!r}, which is not a multiple-choice task with the metric acc: leave it out"
                )
            if name in found["groups"] and not all(map(_counts_all_questions, found["groups"].values())):
                raise EvoPressError(
                    f"evaluation.tasks has {task!r}, a group whose accuracy is not that of all its questions: name its tasks, "
                    f"{', '.join(found['tasks'])}"
                )
            loaded[task] = TaskGroup(tuple(found["tasks"].values())) if name in found["groups"] else found["tasks"][name]
    return loaded


@dataclass(frozen=True)
class TaskGroup:
    """Tasks whose questions count as those of one: a group of lm-eval's that weighs them by size, such as MMLU's 57."""

    tasks: tuple[Any, ...]


def tasks_in(task: Any) -> tuple[Any, ...]:
    """Return lm-eval's tasks in one of those that `load_tasks` returns: itself, or all of a group."""
    return task.tasks if isinstance(task, TaskGroup) else (task,)


def num_questions(task: Any, limit: int | None) -> int:
    """Return how many questions are asked.

    Args: limit: of each of lm-eval's tasks the first ones; None: all.
    """
    with undisturbed():
        counts = [len(each.eval_docs) for each in tasks_in(task)]
    return sum(count if limit is None else min(limit, count) for count in counts)


def questions_digest(tasks: Mapping[str, Any], *, limit: int | None = None) -> str:
    """Return the SHA-256 of what tasks ask and what is right, and of lm-eval's version: what scores depend on beside the model."""
    from lm_eval import __version__
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    digest = hashlib.sha256(str(__version__).encode())
    for name, task in _each(tasks):
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)  # as `measure_zero_shot` does
        asked = [f"{context}\n{continuation}" for context, continuation in _pairs(task, limit=limit)]
        with undisturbed():
            right = [f"{instance.doc} {task.doc_to_target(instance.doc)}" for instance in task.instances]
        digest.update("\n".join([name, *asked, *right]).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _each(tasks: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return lm-eval's tasks, each with the name of what it is of."""
    return [(name, each) for name, task in tasks.items() for each in tasks_in(task)]


@dataclass(frozen=True)
class Asked:
    """What a model takes to answer tasks."""

    tokens: int
    """That enter it; what differs in its last token alone is asked once."""
    longest: int
    """Of one sequence."""


def count_asked(
    tasks: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    config: Any = None,
    bos: str = "auto",
    limit: int | None = None,
) -> Asked:
    """Count what a model is asked, for a task of many questions by `_LOOKED_AT` of them from its beginning to its end.

    Args:
        tasks: as `load_tasks` returns them.
        config: the model's, whose window lm-eval cuts prompts to.
        bos: what every prompt begins with, as `leading_ids` takes it.
        limit: the first questions of each task only; None: all.

    Raises: EvoPressError for an answer that lm-eval cannot score, among the questions that are looked at.
    """
    from lm_eval.models.utils import resolve_max_length

    leading, window = leading_ids(tokenizer, bos), resolve_max_length(config, tokenizer)
    tokens, longest = 0.0, 0
    for name, task in _each(tasks):
        count = num_questions(task, limit)
        looked_at = min(count, max(_LOOKED_AT // len(tasks_in(tasks[name])), 1))
        pairs = _pairs(task, samples=[place * count // looked_at for place in range(looked_at)])
        whole = tokenizer(["".join(pair) for pair in pairs], add_special_tokens=bos != "false")["input_ids"]
        _check_answers(name, pairs, whole, tokenizer(_contexts(pairs), add_special_tokens=bos != "false")["input_ids"], window)
        asked = {tuple(ids[:-1]) for ids in whole}  # the last token is predicted and does not enter
        lengths = [min(len(ids) + len(leading) * (ids[: len(leading)] != leading), window) for ids in asked]
        tokens += sum(lengths) * count / looked_at
        longest = max(longest, *lengths)
    return Asked(round(tokens), longest)


def check_questions(
    tasks: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *, num_rows: int, limit: int | None = None
) -> None:
    """Raise EvoPressError if a question of a task has a token that an embedding of `num_rows` rows lacks."""
    beyond = ids_beyond(tokenizer, num_rows)
    if not beyond:  # so it is with all but a few tokenizers
        return
    for name, task in _each(tasks):
        texts = ["".join(pair) for pair in _pairs(task, limit=limit)]
        found = beyond.keys() & {i for ids in tokenizer(texts)["input_ids"] for i in ids}
        if found:
            token = not_embedded(tokenizer, min(found), num_rows=num_rows)
            raise EvoPressError(f"the questions of task {name!r} have {token}: resize the model's embedding or leave the task out")


def _pairs(task: Any, **some: Any) -> list[tuple[str, str]]:
    """Return what a model is asked by questions of a task: a context, and one of its continuations.

    Args: some: which questions, as lm-eval takes it.
    """
    with undisturbed():
        task.build_all_requests(**some)
    return [instance.args[:2] for instance in task.instances]


def _contexts(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Return contexts without the spaces at their ends, which lm-eval counts to the continuations."""
    return [context.rstrip() for context, _ in pairs]


def _check_answers(
    task: str,
    pairs: Sequence[tuple[str, str]],
    whole: Sequence[Sequence[int]],
    contexts: Sequence[Sequence[int]],
    window: int,
) -> None:
    """Raise EvoPressError if the tokens of an answer, those beyond its context's, are none or more than a window."""
    for (context, continuation), ids, before in zip(pairs, whole, contexts, strict=True):
        answer = len(ids) - len(before) if context.strip() else len(ids)
        if answer < 1 or answer > window:
            what = f"is {answer:,} tokens long, more than the model's {window:,} positions" if answer > window else "has no token"
            raise EvoPressError(
                f"an answer of task {task!r} {what} ({clip(continuation)!r} after {context[-20:]!r}), so lm-eval cannot score it: "
                "leave the task out"
            )


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Keep lm-eval's output away from the terminal, and its seeds, which it begins with, away from the global generators."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [noisy.level for noisy in loggers]
    state, legacy_state = random.getstate(), np.random.get_state()
    try:
        for noisy in loggers:
            noisy.setLevel(logging.ERROR)
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
            torch.random.fork_rng(devices=[]),
        ):
            warnings.simplefilter("ignore")
            with contextlib.suppress(ImportError):  # `load_tasks` says what is missing
                from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

                random.seed(DEFAULT_RANDOM_SEED)
                np.random.seed(DEFAULT_OTHER_SEED)
                torch.default_generator.manual_seed(DEFAULT_OTHER_SEED)
            yield
    finally:
        random.setstate(state)
        np.random.set_state(legacy_state)
        for noisy, level in zip(loggers, levels, strict=True):
            noisy.setLevel(level)


def _task_files(folder: Path, tasks: Sequence[str]) -> dict[str, Path]:
    """Find tasks and groups among lm-eval's own by the line that names them: its index of 15,000 files takes half a minute.

    Raises: EvoPressError for a task that does not exist.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.yaml")):
        text = path.read_bytes()
        for key in (b"task", b"group"):
            if name := re.search(rb"^[\"']?" + key + rb"[\"']?[ \t]*:[ \t]*[\"']?([^\s\"'#]+)", text, re.MULTILINE):
                found.setdefault(name[1].decode(), path)
    for task in tasks:
        if task not in found:
            near = get_close_matches(task, found) or list(PAPER_TASKS)
            raise EvoPressError(f"evaluation.tasks has {task!r}, which is no task of lm-eval: did you mean {' or '.join(near)}?")
    return {task: found[task] for task in tasks}


def _data_folder(task_file: Path, root: Path) -> Path:
    """Return the first folder, of the working directory, the tasks' folder and the task file's own, that has all of a task's data.

    The tasks' folder where none has, so that the error names it.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(task_file, resolve_func=False)
    given = config.get("dataset_kwargs") or {}
    names = [*_strings(given.get("data_files")), *_strings(given.get("data_dir"))]
    names += [name for name in _strings(config.get("dataset_path")) if name.startswith(".")]  # others are formats, or of the hub
    relative = [name for name in names if "://" not in name and not Path(name).is_absolute()]
    folders = (Path.cwd(), root, task_file.parent)
    return next((folder for folder in folders if relative and all(any(folder.glob(name)) for name in relative)), root)


def _strings(value: Any) -> list[str]:
    """Return all strings in nested lists and mappings."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [name for item in value for name in _strings(item)]
    return [value] if isinstance(value, str) else []


def _counts_right_answers(task: Any) -> bool:
    config = task.config
    metrics = [entry["metric"] for entry in config.metric_list or [{"metric": "acc"}]]
    return config.output_type == "multiple_choice" and config.process_results is None and "acc" in metrics


def _counts_all_questions(group: Any) -> bool:
    """Tell whether a group's accuracy is the share of right answers to all its questions."""
    metrics = [metric for metric in group.aggregate_metric_list or () if metric.metric == "acc"]
    return bool(metrics) and all(metric.weight_by_size and metric.aggregation == "mean" for metric in metrics)
