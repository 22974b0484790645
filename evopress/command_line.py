"""What people type: `~` in paths, and one sentence for what Hydra refuses in words of its own."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any

from evopress.run_folder import ANY_JOB
from evopress.settings import DropSettings, JointSettings, QuantSettings, RunSettings, SparsitySettings

NOT_BY_DEFAULT = ("method", "debug", "experiment", "hparams_search")
"""Groups that are not in the defaults list, so that they are written with a plus."""
_WITH_VALUE = (
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"),
    *("--shell-completion", "-sc", "--experimental-rerun", "--info", "-i"),
)
"""Flags of Hydra whose value is the next argument."""
_HELP = "`python -m evopress --help` lists them"
_EXPECTED = {"Float": "a number", "Integer": "a whole number", "Boolean": "true or false", "bool": "true or false"}
_WITHOUT_PLUS = re.compile(rf"({'|'.join(NOT_BY_DEFAULT)})=\w")
_EXTRAS = {"optuna": "optuna", "joblib": "joblib", "submitit_slurm": "slurm", "ray": "ray"}
"""An option of one of Hydra's groups to the extra of ours that brings it."""
_IN_PLACE_OF = {
    "bits": ("size", "budgets", "max_kl", "min_agreement"),
    "sparsity": ("budgets",),  # beside the others it is what pruned levels lie around
    "size": ("budgets",),
}
"""A target to what takes its place, whatever it is, where both are given."""
_OPEN = re.compile(r"(method\.group_sizes|export_options|baselines\.options|data\.options|fitness\.options|evaluation\.files)[.=]")
"""Settings that hold keys of the user's own, which Hydra takes with a plus alone."""
_OF_EVOLUTION = re.compile(r"search\.(num_offspring|survivors|tokens|max_switches|distribution|tokens_per_selection)=")
_AFTER = re.compile(r"search\.strategy\.generations_after=[1-9]")
_TILDE = re.compile(r"(?<=[=\[,])~(?=/|[\w.-]+/|$)[^,\[\]{}'\"]*")
"""An unquoted path that begins with `~`: a value, or an element of a list or a sweep."""


def prepared(arguments: Sequence[str]) -> list[str]:
    """Return arguments as Hydra reads them: a path that begins with `~` is put into quotes, or, of Hydra itself, expanded.

    What holds keys of the user's own, such as `method.group_sizes={2: 32}`, gets the plus that Hydra asks for.

    Settings of ours keep their `~`, so that a run folder says what was typed; `given_path` expands it. Hydra would make a folder
    of that name.
    """
    return [_with_tilde(f"++{argument}" if _OPEN.match(argument) else argument) for argument in arguments]


def flags_first(arguments: Sequence[str]) -> list[str]:
    """Return arguments with Hydra's flags before all settings: between them it takes none."""
    flags: list[str] = []
    settings: list[str] = []
    flag = ""
    for argument in arguments:
        is_value = _takes_value(flag) and not (flag in ("--info", "-i") and "=" in argument)  # of that one it may be left out
        (flags if argument.startswith("-") or is_value else settings).append(argument)
        flag = "" if is_value else argument
    # The next argument would be taken for what is left out.
    alone = [each in ("--info", "-i") and (at + 1 == len(flags) or flags[at + 1].startswith("-")) for at, each in enumerate(flags)]
    return [*("--info=all" if without else each for each, without in zip(flags, alone, strict=True)), *settings]


def _takes_value(flag: str) -> bool:
    """Tell whether the next argument is a flag's value; long flags may be cut short."""
    cut_short = len(flag) > 3 and flag.startswith("--") and any(name.startswith(flag) for name in _WITH_VALUE)
    return flag in _WITH_VALUE or cut_short


def _with_tilde(argument: str) -> str:
    key, equals, value = argument.partition("=")
    if not equals or "~" not in value:
        return argument
    if key.lstrip("+").startswith("hydra."):
        return re.sub(r"(?<==)(['\"]?)~(?=/|$)", lambda found: f"{found[1]}{_home()}", argument, count=1)
    return f"{key}=" + _TILDE.sub(lambda found: f"'{found[0]}'", f"={value}")[1:]


def _home() -> str:
    try:
        return str(Path.home())
    except RuntimeError:  # nobody's: left as it is
        return "~"


def with_plus(arguments: Sequence[str]) -> list[str]:
    """Let `method=quant` mean `+method=quant`, since there is no other by default; beside an experiment it means that one's.

    Wherever they are typed, `+method=quant` comes before an experiment, which changes what its method chooses, and `+debug=tiny`
    after both, which makes smaller what they choose: the last one counts.
    """
    chosen = any(argument.lstrip("+").startswith("experiment=") for argument in arguments)
    found = [_WITHOUT_PLUS.match(argument) for argument in arguments]
    meant = [f"+{each}" if of and not (chosen and of[1] == "method") else each for each, of in zip(arguments, found, strict=True)]
    first = next((place for place, each in enumerate(meant) if each.startswith("+experiment=")), len(meant))
    meant[first:] = sorted(meant[first:], key=lambda each: not each.startswith("+method="))
    last = max((place for place, each in enumerate(meant) if each.startswith(("+method=", "+experiment="))), default=0)
    return [*sorted(meant[: last + 1], key=lambda each: each.startswith("+debug=")), *meant[last + 1 :]]


def with_numbers_shown(arguments: Sequence[str]) -> list[str]:
    """Let `--cfg job` show what will be used, the numbers of the scale among it, as Hydra's `--resolve` does."""
    shows = any(flag in ("--cfg=job", "--cf=job", "-c=job", "-cjob") for flag in arguments) or any(
        flag in ("--cfg", "--cf", "-c") and of == "job" for flag, of in pairwise(arguments)
    )
    return [*arguments, "--resolve"] if shows and "--resolve" not in arguments else list(arguments)


_ALONE = ("--run", "-r", "--multirun", "-m", "--cfg", "-c", "--info", "-i", "--shell-completion", "-sc")
"""Flags of which Hydra takes one."""


def refused(
    arguments: Sequence[str], groups: Mapping[str, Sequence[str]], *, is_sweep: Callable[[str], bool] = lambda argument: False
) -> str | None:
    """Return the sentence for what Hydra has no good words for; None: there is none.

    That is a setting that is written as a flag, `--bits 2.5`, a group that is written as one, a part of what is set as a whole,
    `stages.0=search`, a sweep whose jobs would have one folder, and a target beside another that takes its place.

    Args: is_sweep: tells whether an argument has several values.
    """
    known, multirun = {*_settings(), *groups}, bool({"-m", "--multirun"} & set(arguments))
    alone = [argument for argument in arguments if argument in _ALONE]
    if len(alone) > 1:
        return f"{' and '.join(alone)} cannot be combined: give one of them"
    for argument in arguments:
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("--") and (name := name.replace("-", "_")) in known:
            plus = "+" if name in NOT_BY_DEFAULT else ""
            return f"{argument} is no flag: settings are written key=value, {plus}{name}={value if equals else '...'}"
        key = argument.lstrip("+").partition("=")[0]
        if "." in key and (group := key.replace(".", "/")) in groups:
            return f"{argument} names a config group: write {group}={value}"
        if whole := _set_as_a_whole(key.lstrip("~"), known, groups):
            return f"{argument} sets a part of {whole}, which is set as a whole: write {whole}=..."
        if multirun and not key.startswith("hydra") and ANY_JOB.fullmatch(key) and is_sweep(argument):
            return (
                f"{argument} cannot be swept over: {key} is not part of a job's folder name, so that all jobs would share one; "
                "run one sweep for each value, with its own hydra.sweep.dir=DIR"
            )
        if argument.replace(" ", "") == "hydra.launcher.n_jobs=0":
            return f"{argument} is no number of jobs: give one, or -1 for one on each core"
        if argument == "resume=":
            return "resume= names no folder: give that of a run, resume=RUN_FOLDER"
        if multirun and argument.startswith("resume=") and argument != "resume=null":
            return f"{argument} resumes a single run: leave -m out; a sweep is resumed by its own command, in the same folder"
    if both := two_targets(arguments, arguments):
        return f"{' and '.join(both)} are both given: leave one of them out"
    return None


def _set_as_a_whole(key: str, known: Collection[str], groups: Collection[str]) -> str:
    """Return the setting of which a key names a part, such as an element of its list; "" if there is none, or it has keys."""
    whole = key.rpartition(".")[0]
    while whole and whole not in known:
        whole = whole.rpartition(".")[0]
    has_keys = _OPEN.match(f"{whole}.") or whole.replace(".", "/") in groups or any(name.startswith(f"{whole}.") for name in known)
    return "" if has_keys else whole


def two_targets(arguments: Sequence[str], others: Sequence[str]) -> tuple[str, str] | None:
    """Return a target among arguments with what takes its place among others, the last of each counts; None: nothing does."""
    given, beside = ({each.partition("=")[0].lstrip("+"): each for each in some} for some in (arguments, others))
    for key, instead in _IN_PLACE_OF.items():
        for other in instead if _says(given.get(key)) else ():
            if _says(beside.get(other)):
                return given[key], beside[other]
    return None


def unused(arguments: Sequence[str], *, strategy: str) -> Iterator[str]:
    """Yield a sentence for each argument that the chosen search makes no use of."""
    for argument in arguments if strategy == "guided" else ():
        if argument.startswith("search.generations="):
            yield (
                f"{argument} has no effect with search/strategy=guided: set search.strategy.rounds and "
                "search.strategy.second_order_rounds, or search.strategy.generations_after for evolution after them"
            )
        elif _OF_EVOLUTION.match(argument) and not any(map(_AFTER.match, arguments)):
            yield (
                f"{argument} has no effect with search/strategy=guided unless evolution follows its rounds: set "
                "search.strategy.generations_after, choose search/strategy=evolution, or leave it out"
            )


def _says(argument: str | None) -> bool:
    """Tell whether something is given, and not taken back."""
    return argument is not None and argument.partition("=")[2] not in ("", "null", "[]")


def told(error: Exception, groups: Mapping[str, Sequence[str]]) -> str:
    """Return one sentence for an error of Hydra's or OmegaConf's about the command line.

    Args: groups: config group to its options.
    """
    cause = error.__cause__
    text = str(error) if cause is None else f"{error}\n{cause}"
    for pattern, say in _SENTENCES:
        if found := re.search(pattern, text, re.DOTALL):
            return say(found, error, groups)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"the command line cannot be used ({' '.join(lines[:2]).rstrip('.')}): settings are written key=value, {_HELP}"


def _not_chosen(found: re.Match[str], error: Exception, groups: Mapping[str, Sequence[str]]) -> str:
    """A group that is not in the defaults list: `method=quant`."""
    group, option = found[1], found[2]
    if not option:
        return f"{group}= names no option: write {_either([f'+{group}={name}' for name in groups.get(group, ())])}"
    return f"{group}={option} lacks its plus, since no {group} is chosen by default: write +{group}={option}"


def _no_setting(found: re.Match[str], error: Exception, groups: Mapping[str, Sequence[str]]) -> str:
    """A key that no schema has: `bit=2.5`."""
    key = found[1]
    known = [*_settings(), *groups]
    if key in known:  # of another option of its group
        return f"{key} is a setting, but not of the {key.partition('.')[0]} that was chosen: leave it out, or choose another"
    near = get_close_matches(key, known, n=3, cutoff=0.75)
    near += [name for name in known if name not in near and name.rpartition(".")[2] == key.rpartition(".")[2]]
    return f"{key} is no setting: " + (f"did you mean {_either(near[:3])}?" if near else _HELP)


def _no_seed(found: re.Match[str], error: Exception, groups: Mapping[str, Sequence[str]]) -> str:
    """A sampler of Optuna's that draws nothing: `hydra/sweeper/sampler=grid`."""
    return (
        "hydra/sweeper/sampler=grid draws nothing and takes no seed, which +hparams_search=optuna gives its sampler: choose "
        "another one, such as tpe, or sweep over a grid without +hparams_search=optuna, by search/strategy=evolution "
        "search.max_switches=1,3,7"
    )


def _of_a_clone(found: re.Match[str], error: Exception, groups: Mapping[str, Sequence[str]]) -> str:
    """What is in a clone alone: `hydra/callbacks=page`."""
    return "hydra/callbacks=page needs the folder experiments, which a clone has and no installation: run it there, or leave it out"


def _no_option(found: re.Match[str], error: Exception, groups: Mapping[str, Sequence[str]]) -> str:
    """An option that a group does not have: `model=nope`."""
    group = max((name for name in groups if found[1].startswith(f"{name}/")), key=len, default=found[1].rpartition("/")[0])
    option = found[1].removeprefix(f"{group}/")
    if group == "model" and "/" in option:
        return f"model={option} is not there: a folder or a hub id is named by model.path={option}"
    options = list(getattr(error, "options", None) or groups.get(group, ()))
    near = get_close_matches(option, options, n=1)
    plus = "+" if group in NOT_BY_DEFAULT else ""
    what = f"{group}={option}" if group else option
    if group.startswith("hydra/") and (extra := _EXTRAS.get(option)):
        return f"{what} needs a plugin that is not installed: pip install -e '.[{extra}]' in the clone"
    if not options:
        return f"{what} is not among the configurations: {_HELP}"
    meant = f"did you mean {near[0]}? There is" if near else "choose one of"
    return f"{what} is not there: {meant} {', '.join(options)}" + ("" if option else f", such as {plus}{group}={options[-1]}")


def _unreadable(found: re.Match[str], error: Exception, groups: Mapping[str, Sequence[str]]) -> str:
    """An argument that is not in Hydra's grammar: `quant`, `stages=[search,`, `model.path=/a(1)`."""
    argument = str(getattr(error, "override", None) or found[0])
    key, equals, value = argument.partition("=")
    if not equals:
        return f"{argument!r} is no setting: write key=value, such as +method=quant bits=2.5, and quotes around what holds spaces"
    if value.count("[") != value.count("]") or value.count("{") != value.count("}"):
        return f"{argument} has a bracket that is not closed: write the list without spaces, or all of it in quotes, 'key=[a, b]'"
    if value.endswith(",") and value != ",":
        return f"{argument} ends with a comma: leave it out, {key}={value.rstrip(',')}, or give another value after it"
    quote = '"' if '"' not in value else "'"
    written = shlex.quote(f"{key}={quote}{value}{quote}") if quote not in value else "it with backslashes before its quotes"
    return f"{argument} holds characters that mean something to Hydra: write {written}"


def _several(found: re.Match[str], error: Exception, groups: Mapping[str, Sequence[str]]) -> str:
    """Several values for one setting, without a sweep: `bits=2,5`."""
    argument = found[1]
    key, _, value = argument.partition("=")
    number = f", or {key}={value.replace(',', '.')} for one number" if re.fullmatch(r"\d+,\d+", value) else ""
    return f"{argument} gives several values: add -m for a sweep over them, or write '{key}=[{value}]' for a list{number}"


def _no_list(found: re.Match[str], error: Exception, groups: Mapping[str, Sequence[str]]) -> str:
    """One value where a list is expected: `stages=export`."""
    key, _, value = found[1].partition("=")
    return f"{found[1]} is not a list: write {shlex.quote(f'{key}=[{value}]')}"


def _no_such_type(found: re.Match[str], error: Exception, groups: Mapping[str, Sequence[str]]) -> str:
    """A value of another type: `bits=abc`."""
    return f"{found[1]} is out of range: expected {_EXPECTED.get(found[2], found[2].lower())}"


def _null(found: re.Match[str], error: Exception, groups: Mapping[str, Sequence[str]]) -> str:
    return f"{found[1].lstrip('+')} is out of range: it must have a value"


def _twice(found: re.Match[str], error: Exception, groups: Mapping[str, Sequence[str]]) -> str:
    return f"{found[1]} is chosen twice: choose one option of it"


_SENTENCES = (
    (r"Could not override '([^']*)'\. No match in the defaults list\..*?\+\S*?=(\S*)", _not_chosen),
    (r"Could not override '([^']*)'", _no_setting),
    (r"Key 'seed' not in 'SamplerConfig'", _no_seed),
    (r"Could not (?:find|load) '([^']*)'", _no_option),
    (r"Ambiguous value for argument '([^\n]*)'", _several),
    (r"Error merging override (\S+)\n[^\n]*is not a ListConfig", _no_list),
    (r"Error merging override (\S+)\n[^\n]*could not be converted to (\w+)", _no_such_type),
    (r"Error merging override (\S+)\n[^\n]*is not a valid (bool)", _no_such_type),
    (r"Error merging override (\S+)\n[^\n]*(?:Incompatible value 'None'|is not Optional)", _null),
    (r"Multiple values for (\S+?)\. ", _twice),
    (r"Error locating target 'experiments\.", _of_a_clone),
    (
        r"LexerNoViableAltException: ([^\n]*)|Error parsing override|no viable alternative|mismatched input|extraneous input",
        _unreadable,
    ),
)
"""What Hydra and OmegaConf say to who turns it into a sentence; the first that fits."""


def _settings() -> list[str]:
    """Return the dotted names of all settings, those of every method included."""
    schemas = (QuantSettings, SparsitySettings, DropSettings, JointSettings)
    methods = dict.fromkeys(f"method.{each.name}" for schema in schemas for each in fields(schema))
    return [*_names(RunSettings()), *methods]


def _names(settings: Any, prefix: str = "") -> Iterator[str]:
    for each in fields(settings):
        value = getattr(settings, each.name)
        yield f"{prefix}{each.name}"
        if is_dataclass(value):
            yield from _names(value, f"{prefix}{each.name}.")


def _either(names: Sequence[str]) -> str:
    return " or ".join(names)
