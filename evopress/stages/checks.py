"""What can be refused from settings alone, before any model work; what a search will cost."""

from __future__ import annotations

from dataclasses import fields
from difflib import get_close_matches

from evopress.baselines.baseline import EXPERTS, MODULES, WEIGHTS, check_minibatch
from evopress.baselines.named import BASELINES, make_baselines, names_serving
from evopress.currencies import EXPERT
from evopress.data.special_tokens import ids_beyond
from evopress.errors import EvoPressError
from evopress.evaluation import tasks
from evopress.search.evolution import SearchSettings
from evopress.search.strategies import strategy_of
from evopress.search.strategy import Searching
from evopress.settings import DropSettings, RunSettings, SearchConfig
from evopress.workspace import Workspace


def check_names(settings: RunSettings) -> None:
    """Raise EvoPressError for baselines that do not exist, or not for this method, or options of none."""
    kind = WEIGHTS
    if isinstance(settings.method, DropSettings):
        kind = EXPERTS if settings.method.granularity == EXPERT else MODULES
    for name in settings.baselines.options:
        if name not in BASELINES:
            near = get_close_matches(name, BASELINES, n=1) or list(BASELINES)
            raise EvoPressError(f"baselines.options has {name!r}, which is no baseline: did you mean {' or '.join(near)}?")
    for name in settings.baselines.names:
        known = name in BASELINES
        if not known or kind not in make_baselines(settings.baselines, [name])[name].serves:
            fault = f"method {settings.method.name} does not support" if known else "is unknown"
            raise EvoPressError(f"baselines.names has {name!r}, which {fault}: choose among {', '.join(names_serving(kind))}")


def check_tasks(settings: RunSettings) -> None:
    """Raise EvoPressError if the zero-shot tasks of a run that will be evaluated, or their questions, are not to be had."""
    if settings.evaluation.tasks and "evaluate" in settings.stages:
        tasks.load_tasks(settings.evaluation.tasks, tasks_path=settings.evaluation.tasks_path)


def check_questions(workspace: Workspace) -> None:
    """Raise EvoPressError if a zero-shot question has a token that the model's embedding lacks."""
    evaluation, num_rows = workspace.settings.evaluation, workspace.embedding_rows
    if workspace.model_source.is_outline:
        return
    if evaluation.tasks and "evaluate" in workspace.settings.stages and num_rows and ids_beyond(workspace.tokenizer, num_rows):
        loaded = tasks.load_tasks(evaluation.tasks, tasks_path=evaluation.tasks_path)
        tasks.check_questions(loaded, workspace.tokenizer, num_rows=num_rows, limit=evaluation.task_limit)


def check_tokens(settings: RunSettings) -> None:
    """Raise EvoPressError if a split is shorter than one sequence, or a minibatch larger than the search text."""
    length, data, search = settings.model.sequence_length, settings.data, settings.search
    for split in ("calibration", "search", "evaluation"):
        count = getattr(data, f"{split}_tokens")
        if count < length:
            raise EvoPressError(
                f"data.{split}_tokens={count} does not fill one sequence of model.sequence_length={length}: ask for more tokens or "
                "shorten the sequences"
            )
    if "refine" in settings.stages and not isinstance(settings.method, DropSettings) and settings.refine.tokens < length:
        raise EvoPressError(
            f"refine.tokens={settings.refine.tokens} does not fill one sequence of model.sequence_length={length}: ask for more "
            "tokens, or leave refine out of stages"
        )
    available = data.search_tokens // length * length
    asks = searching(search, derived=1).asks()
    minibatches = [(ask.key, ask.tokens) for ask in asks]
    if any(ask.attribution for ask in asks) and available < 2 * length:
        raise EvoPressError(
            f"search/strategy={search.strategy.name} needs at least 2 sequences of search text: raise data.search_tokens="
            f"{data.search_tokens} to twice model.sequence_length={length}"
        )
    for key, count in minibatches:
        check_minibatch(settings, key, count)
    check_baselines(settings)


def check_baselines(settings: RunSettings) -> None:
    """Raise EvoPressError for numbers of baselines that the text has too little for."""
    for baseline in make_baselines(settings.baselines).values():
        baseline.check(settings)


def searching(config: SearchConfig, *, derived: int | None = None) -> Searching:
    """Return the numbers of the search by the strategy that the settings choose.

    Args: derived: generations where the settings give none.

    Raises: EvoPressError if there is no such strategy, or one of its numbers is out of range, or missing.
    """
    given = {each.name: getattr(config, each.name) for each in fields(SearchSettings)}
    if config.generations is None:
        given["generations"] = derived
    return strategy_of(config.strategy).searching(SearchSettings(**given))


def searching_of(workspace: Workspace) -> Searching:
    """Return the checked numbers of a run's search, those that depend on the model too."""
    return searching(workspace.settings.search, derived=workspace.generations(workspace.settings))


def check_strategy(settings: RunSettings) -> None:
    """Raise EvoPressError if the search asks for attributions and nothing can answer."""
    if "search" not in settings.stages or not any(ask.attribution for ask in searching(settings.search, derived=1).asks()):
        return
    name = settings.search.strategy.name
    if getattr(settings.method, "granularity", None) == EXPERT:
        raise EvoPressError(
            f"search/strategy={name} does not support method.granularity=expert, since an expert that receives no tokens has no "
            "gradient: use search/strategy=evolution"
        )
    if settings.fitness.evaluator == "plain":
        raise EvoPressError(f"search/strategy={name} needs fitness.evaluator=population, not plain: leave one of them out")


def search_cost(numbers: Searching, *, modules: bool = False, units: int = 0, starts: int = 0) -> int:
    """Return the candidate tokens that a search evaluates at most: the one honest currency.

    Args:
        modules: whether some can be dropped.
        units: how many there are, as far as that is known.
        starts: genomes that the run gives to choose the initial one from, beside the search's own.
    """
    asks = numbers.asks()
    chosen_from = [ask for ask in asks if ask.initial and starts and not (ask.attribution or ask.neighbours)]
    given = sum(ask.tokens * (starts + (0 if ask.candidates else 1)) for ask in chosen_from)
    return given + sum(ask.cost_where(modules=modules, units=units) for ask in asks)
