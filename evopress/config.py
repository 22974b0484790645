"""The bridge to Hydra: register the schemas, resolve scales, turn a composed config into plain dataclasses."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from hydra._internal import hydra as hydra_internal
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins import structured_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.plugins import Plugins
from hydra.errors import CompactHydraException, HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from evopress import settings as schema
from evopress.errors import EvoPressError, first_line, reason_of
from evopress.run_folder import job_folder
from evopress.search.strategies import STRATEGIES, settings_class
from evopress.settings import METHODS, RunSettings

logger = logging.getLogger(__name__)
_SCHEMAS: dict[str, tuple[str, type]] = {
    "model": ("base_model", schema.ModelSettings),
    "data": ("base_data", schema.DataSettings),
    "level_db": ("base_level_db", schema.LevelDatabaseSettings),
    "fitness": ("base_fitness", schema.FitnessSettings),
    "search": ("base_search", schema.SearchConfig),
    "scale": ("base_scale", schema.ScaleSettings),
    "evaluation": ("base_evaluation", schema.EvaluationSettings),
    "tracker": ("base_tracker", schema.TrackerSettings),
    "paths": ("base_paths", schema.PathsSettings),
}
_AT_SCALE = {
    "search": {name: f"${{at_scale:{name}}}" for name in ("generations", "num_offspring", "survivors", "tokens", "initial_tokens")},
    "scale": {
        "random_tokens": "${number_at_scale:16384,${scale.tokens},0.125}",
        "baseline_tokens": "${number_at_scale:131072,${scale.tokens},0.03125}",
    },
}
"""What a scale makes of the paper's numbers, unless a YAML or the command line says otherwise: that is taken as it is."""
_FACTORS = {"num_offspring": "offspring", "survivors": "offspring", "initial_tokens": "tokens"}


def config_folder() -> Path:
    """Return the config tree: inside the package when installed from a wheel, beside it in a clone."""
    packaged = Path(__file__).parent / "conf"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "conf"


@dataclass
class BrokenStrategy:
    """A strategy of an installed package that cannot be loaded: its name can be chosen, to be told why."""

    name: str
    why: str


class JobFailedError(CompactHydraException):  # type: ignore[misc, unused-ignore]
    """A job of a launcher, or a trial of a sweeper that tunes, failed, and has said why."""


class StructuredConfigSource(structured_config_source.StructuredConfigSource):  # type: ignore[misc, unused-ignore]
    """Hydra's source of schemas; ours are not listed, since they are no options that a person chooses."""

    def list(self, config_path: str, results_filter: ObjectType | None) -> Any:
        """Return what lies in a group, without the schemas."""
        return [name for name in super().list(config_path, results_filter) if not name.startswith("base_")]

    def __deepcopy__(self, memo: dict[int, Any]) -> StructuredConfigSource:
        """Return itself: Hydra copies its sources whenever it lists a group, and this one's store is the process's only one."""
        return self


class ConfigLoader(ConfigLoaderImpl):  # type: ignore[misc, unused-ignore]
    """Hydra's loader, which composes a config to see its mode, and again to run it or to sweep; ours hands over what it has."""

    _seen: tuple[list[str], DictConfig | HydraException] | None = None
    """Overrides, and what comes of composing the config of a run with them."""

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        """Compose a config as Hydra does; what is asked for next gets the one that its mode was read from."""
        if not validate_sweep_overrides:  # to see the mode
            try:
                seen = super().load_configuration(config_name, overrides, RunMode.RUN, from_shell, False)
            except HydraException as error:  # perhaps for what a sweep may leave open
                self._seen = list(overrides), error
                return super().load_configuration(config_name, overrides, run_mode, from_shell, False)
            self._seen = list(overrides), seen
            return seen
        (given, seen), self._seen = self._seen or ([], None), None
        added = overrides[len(given) :]
        same = overrides[: len(given)] == given and added in ([], [f"hydra.mode={run_mode.name}"])
        if seen is None or not same or (isinstance(seen, HydraException) and run_mode != RunMode.RUN):
            return super().load_configuration(config_name, overrides, run_mode, from_shell, validate_sweep_overrides)
        self.validate_sweep_overrides_legal(OverridesParser.create().parse_overrides(overrides), run_mode, from_shell)
        if isinstance(seen, HydraException):
            raise seen
        if added:
            seen.hydra.mode = run_mode
            seen.hydra.overrides.hydra.extend(added)
        return seen


def options() -> dict[str, list[str]]:
    """Return the options of every config group, those of Hydra's own left out."""
    found: dict[str, list[str]] = {}
    for path in sorted(config_folder().rglob("*.yaml")):
        group = path.parent.relative_to(config_folder()).as_posix()
        if group not in (".", "hydra") and not group.startswith("hydra/"):
            found.setdefault(group, []).append(path.stem)
    return found


def register() -> None:
    """Register schemas and resolvers, before Hydra composes."""
    _register_schemas()
    _register_strategies(ConfigStore.instance())


@cache
def _register_schemas() -> None:
    """Register what does not depend on what is installed, once."""
    Plugins.instance()  # registers Hydra's own sources, which then may be replaced
    SourcesRegistry.instance().types["structured"] = StructuredConfigSource
    hydra_internal.ConfigLoaderImpl = ConfigLoader
    store = ConfigStore.instance()
    store.store(name="base_run", node=RunSettings)
    for group, (name, node) in _SCHEMAS.items():
        schema_of_group = OmegaConf.structured(node)
        for key, value in _AT_SCALE.get(group, {}).items():
            schema_of_group[key] = value
        store.store(group=group, name=name, node=schema_of_group)
    for method, node in METHODS.items():
        store.store(group="method", name=f"base_{method}", node=node)
    OmegaConf.register_new_resolver("at_scale", _at_scale, replace=True)
    OmegaConf.register_new_resolver("number_at_scale", schema.at_scale, replace=True)
    OmegaConf.register_new_resolver("tasks_for", lambda num_gpus: num_gpus or 1, replace=True)  # of a Slurm job; without GPUs one
    OmegaConf.register_new_resolver("scaled", _scaled, replace=True)  # in configs of earlier versions
    OmegaConf.register_new_resolver("stages_by_default", lambda refine: schema.stages_by_default(refine=refine), replace=True)


def _register_strategies(store: ConfigStore) -> None:
    """Register the schemas of our search strategies, and those of installed packages as the options that they are."""
    there = options().get("search/strategy", [])
    for name in STRATEGIES:
        try:
            node: Any = OmegaConf.structured(settings_class(name, key="search/strategy")())
        except EvoPressError as error:
            node = BrokenStrategy(name, str(error))
        except Exception as error:  # of another package
            why = (
                f"{STRATEGIES.called(name)} cannot be an option ({reason_of(error)}): each of its settings needs a "
                "default, of a type that a config can hold; repair that package, or choose another search/strategy"
            )
            node = BrokenStrategy(name, why)
        store.store(group="search/strategy", name=f"base_{name}" if name in there else name, node=node)


def _job_folder(overrides: Sequence[str], sweep: str) -> str:
    """Return `${job_folder:OVERRIDES,SWEEP}`: where a job of a sweep goes below the sweep's folder."""
    return job_folder(list(overrides), Path(sweep))


def _at_scale(key: str, *, _root_: DictConfig) -> Any:
    """Return `${at_scale:tokens}`: what the scale makes of the search's paper numbers of that name; ours where there are none."""
    paper, factor = _root_.search.paper[key], _root_.scale[_FACTORS.get(key, key)]
    least = _root_.search.least.get(key)
    if paper is None:
        return getattr(schema.SearchConfig(), key)
    return schema.all_at_scale(paper, factor, least) if OmegaConf.is_list(paper) else schema.at_scale(paper, factor, least or 0.0)


def _scaled(value: int, factor: float, least: int = 1) -> int:
    """Return `${scaled:value,factor,least}`, what the YAMLs of earlier versions have: never below the number `least`."""
    return max(round(value * factor), min(least, value))


def to_settings(config: DictConfig) -> RunSettings:
    """Convert a composed config; checks of the dataclasses run here.

    Raises: EvoPressError without a method, or if a value is missing or out of range, or a key is unknown.
    """
    if "method" not in config or OmegaConf.is_missing(config, "method"):
        raise EvoPressError(
            f"no method was chosen: add one of {', '.join(f'+method={name}' for name in options()['method'])} to the command"
        )
    try:
        settings = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise EvoPressError(f"the configuration is incomplete: {first_line(error)}") from None
    assert isinstance(settings, RunSettings)
    if isinstance(settings.search.strategy, BrokenStrategy):
        raise EvoPressError(settings.search.strategy.why)
    _check_keys(settings)
    return settings


def _check_keys(settings: Any, prefix: str = "") -> None:
    """Raise EvoPressError for a key that no schema has; Hydra lets `+key=value` through."""
    known = [field.name for field in fields(settings)]
    for key, value in vars(settings).items():
        if key not in known:
            near = get_close_matches(key, known) or known
            meant = " or ".join(f"{prefix}{name}" for name in near)
            raise EvoPressError(f"{prefix}{key} is no setting: remove it, or did you mean {meant}?")
        if is_dataclass(value):
            _check_keys(value, f"{prefix}{key}.")


def composed_with(overrides: Sequence[str]) -> DictConfig:
    """Compose the config of the job that is at work again, with other overrides."""
    config = GlobalHydra.instance().config_loader().load_sweep_config(HydraConfig.instance().cfg, list(overrides))
    with read_write(config), open_dict(config):
        del config["hydra"]
    return config


def at_paper_scale(config: DictConfig) -> RunSettings | None:
    """Return the same run at the paper's size, to say what it would cost; explicit values stay.

    Returns: None where they do not go with the paper's, such as fewer offspring than it has survivors.
    """
    other = copy.deepcopy(config)
    paper = OmegaConf.load(config_folder() / "scale" / "paper.yaml")
    assert isinstance(paper, DictConfig)
    del paper["defaults"]
    OmegaConf.set_readonly(other, False)
    other.scale = OmegaConf.merge(OmegaConf.structured(schema.ScaleSettings), paper)
    try:
        return to_settings(other)
    except EvoPressError as error:
        logger.debug("at scale=paper: %s", error)
        return None


def with_numbers(config: DictConfig) -> DictConfig:
    """Return a composed config in which what a scale makes of the paper's numbers stands as numbers."""
    other = copy.deepcopy(config)
    OmegaConf.set_readonly(other, False)
    for group, scaled in _AT_SCALE.items():
        for key in scaled:
            other[group][key] = config[group][key]
    return other


def plain_dict(config: DictConfig) -> dict[str, Any]:
    """Return a composed config as plain containers, for trackers and reports."""
    container = OmegaConf.to_container(config, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def kept_settings(folder: Path, keys: Sequence[str]) -> dict[str, Any]:
    """Return settings, or whole groups, of the composed config that a run's folder keeps; those that are there."""
    try:
        config = OmegaConf.load(folder / ".hydra" / "config.yaml")
        found = {key: OmegaConf.select(config, key) for key in keys if key in config}
        return {key: plain_dict(each) if isinstance(each, DictConfig) else each for key, each in found.items()}
    except (OSError, ValueError, TypeError, YAMLError, OmegaConfBaseException):  # there is none, or it is damaged
        return {}


def override(key: str, value: str) -> str:
    """Return `key=value` as Hydra must be told it to compose exactly this text, quoted where it would read anything else."""
    plain = f"{key}={value}"
    if value_of(plain) == value:
        return plain
    escaped = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)  # or it would be an interpolation
    return f"{key}={QuotedString(text=escaped, quote=Quote.single).with_quotes()}"


def value_of(override: str) -> str | None:
    """Return the text that `key=value` gives a key; None where Hydra cannot read it, or it is no text as it stands."""
    value = _read(override)
    return None if value is None or OmegaConf.is_config(value) else str(value)


def list_of(override: str) -> list[str]:
    """Return the elements that `key=[a,b]` gives a key; nothing where Hydra cannot read it, or it is no list."""
    value = _read(override)
    return [str(each) for each in value] if OmegaConf.is_list(value) else []


def _read(override: str) -> Any:
    try:
        value = OverridesParser.create().parse_override(override).value()
        return OmegaConf.create({"value": value}).value
    except (HydraException, OmegaConfBaseException):
        return None


def is_sweep(argument: str) -> bool:
    """Tell whether an argument gives a key several values."""
    try:
        return OverridesParser.create().parse_override(argument).is_sweep_override()
    except HydraException:
        return False


# At import: a launcher's process needs it before it comes to us.
OmegaConf.register_new_resolver("job_folder", _job_folder, replace=True)
