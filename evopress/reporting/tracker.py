"""Send a run's numbers, tables and figures to an experiment tracker: Weights & Biases, or nothing at all.

A tracker is a spectator: it asks no questions, keeps nobody waiting, and its failures never end a run.
"""

from __future__ import annotations

import logging
import netrc
import os
import re
import secrets
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args
from urllib.parse import urlsplit

from evopress.errors import EvoPressError
from evopress.files import write_bytes
from evopress.reporting.metrics import AXES
from evopress.reporting.records import plain
from evopress.reporting.sweep import experiment_name, job_name, sweep_name

Mode = Literal["online", "offline", "disabled"]

_MODES: dict[str, Mode] = {"online": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}

PROJECT = "evopress"
"""Where runs appear unless something else is said."""

_RUN_ID = Path("wandb") / "run_id.txt"
_EARLIER = Path("wandb") / "earlier"
"""Parts of an offline run that a later one replaces: deeper than `wandb sync` looks."""
_LAST = ("log a figure", "log an artifact")
"""What the stage report alone does."""
_MOST_REASON = 600
_SLOW = 5.0
"""Seconds after which a failure is one of a service that does not answer; the next would take as long."""
_MOST_TAG = 64
"""W&B refuses longer tags."""

_MANY = 1000
"""Generations that W&B is told of in a second or two; before more of them are sent, a line says what takes so long."""

History = Callable[[], Iterable[Mapping[str, float]]]

_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """What follows a run. The calls come in this order: `start`, then any of the others, `finish` last."""

    def start(
        self,
        *,
        config: dict[str, Any],
        run_dir: Path,
        name: str | None,
        group: str | None,
        tags: Sequence[str],
        history: History = tuple,
    ) -> None:
        """Prepare the tracker's run, described by the composed config; it is opened when there is something to show.

        Args: history: returns the numbers of all generations that are done, `generation` among them, in order.
        """

    def log(self, metrics: Mapping[str, float], *, generation: int) -> None:
        """Record numbers of one generation, once; `tokens` and `seconds` among them are further x axes."""

    def lines(self, values: Mapping[str, float], *, axes: Sequence[Mapping[str, float]]) -> None:
        """Draw horizontal lines beside the curves.

        Args: axes: where they begin and end, on every x axis.
        """

    def summarize(self, values: Mapping[str, float]) -> None:
        """Record numbers of the whole run."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Record a table."""

    def figure(self, name: str, path: Path) -> None:
        """Record a figure, a PNG file."""

    def artifact(self, name: str, type: str, paths: Sequence[Path]) -> None:
        """Record files under one name; they must stay as they are until `finish`."""

    def finish(self) -> None:
        """Close the tracker's run."""


def track_figures(tracker: Tracker, paths: Iterable[Path]) -> None:
    """Record those of some pictures that are PNG, by their names."""
    for path in paths:
        if path.suffix == ".png":
            tracker.figure(path.stem, path)


class NullTracker:
    """Follow nothing: costs nothing and imports nothing."""

    def start(
        self,
        *,
        config: dict[str, Any],
        run_dir: Path,
        name: str | None,
        group: str | None,
        tags: Sequence[str],
        history: History = tuple,
    ) -> None:
        pass

    def log(self, metrics: Mapping[str, float], *, generation: int) -> None:
        pass

    def lines(self, values: Mapping[str, float], *, axes: Sequence[Mapping[str, float]]) -> None:
        pass

    def summarize(self, values: Mapping[str, float]) -> None:
        pass

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        pass

    def figure(self, name: str, path: Path) -> None:
        pass

    def artifact(self, name: str, type: str, paths: Sequence[Path]) -> None:
        pass

    def finish(self) -> None:
        pass


class WandbTracker:
    """Follow a run in Weights & Biases; its files go to `wandb/` in the run folder.

    Jobs of a sweep are grouped under the sweep's name and named by their folders, unless a group or a name is given; a run is
    tagged with the experiment it is of. The W&B run is opened when the first number is there, so a run that is refused leaves
    nothing. A run that is resumed goes on in the same W&B run, whose id lies in the run folder: online it gets the generations
    that W&B lacks. Offline each part has all of them: `wandb sync` would append it to earlier ones, so these are moved to
    `wandb/earlier/` when one ends that has the report's figures, too; where one was sent already, the run goes on as a W&B run
    of its own. Metrics are drawn against the generation, and `tokens` and `seconds` are there as further axes. The first
    failure of a table, figure or artifact is logged as a warning, any other turns the tracker off. Where the service did not
    answer in time, the process's later runs are offline.

    Args:
        mode: None takes what wandb is set to (WANDB_MODE, `wandb offline`), online by default. Online without an API key becomes
            offline.
        project, entity: where the run appears; None leaves it to what wandb is set to, else to "evopress" and to the account.
        init_timeout: seconds that opening the run may take.
        finish_timeout: seconds that the last upload may take; what is not sent by then stays in the run folder.

    Raises: EvoPressError if the mode is unknown.
    """

    def __init__(
        self,
        mode: Mode | None = None,
        project: str | None = None,
        entity: str | None = None,
        *,
        init_timeout: float = 60.0,
        finish_timeout: float = 120.0,
    ) -> None:
        if mode is not None and mode not in get_args(Mode):
            raise EvoPressError(f"tracker mode {mode!r} is unknown: choose one of {', '.join(get_args(Mode))}")
        self.mode = mode
        self.project = project
        self.entity = entity
        self.init_timeout = init_timeout
        self.finish_timeout = finish_timeout
        self._wandb: Any = None
        self._run: Any = None
        self._borrowed: list[str] = []
        self._open: Callable[[], None] | None = None
        self._sent = -1
        """The last generation that W&B has."""
        self._online = False
        self._warned = False
        self._is_whole = False
        """Whether this part of the run has what only the stage report shows."""
        self._given_up: set[str] = set()
        """What a service that does not answer is not asked for again."""

    def start(
        self,
        *,
        config: dict[str, Any],
        run_dir: Path,
        name: str | None,
        group: str | None,
        tags: Sequence[str],
        history: History = tuple,
    ) -> None:
        if self._wanted() != "disabled":
            self._open = lambda: self._start(config, run_dir, name, group, tags, history)

    def log(self, metrics: Mapping[str, float], *, generation: int) -> None:
        if self._opened() and generation > self._sent:
            self._try("log", lambda: self._run.log({**metrics, "generation": generation}))
            self._sent = generation

    def lines(self, values: Mapping[str, float], *, axes: Sequence[Mapping[str, float]]) -> None:
        for place in axes if values else ():
            if self._opened():
                self._try("log lines", lambda place=place: self._run.log({**values, **place}))  # type: ignore[misc]

    def summarize(self, values: Mapping[str, float]) -> None:
        if self._opened():
            self._try("write the summary", lambda: self._run.summary.update(dict(values)))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        if self._opened():
            self._try_one("log a table", lambda: self._run.log({name: self._table(columns, rows)}))

    def figure(self, name: str, path: Path) -> None:
        if self._opened():
            self._try_one("log a figure", lambda: self._run.log({name: self._wandb.Image(str(path))}))

    def artifact(self, name: str, type: str, paths: Sequence[Path]) -> None:
        if self._opened():
            self._try_one("log an artifact", lambda: self._log_artifact(name, type, paths))

    def finish(self) -> None:
        if self._run is not None:
            self._try("finish", self._end)
        self._run = self._open = None
        for variable in self._borrowed:
            os.environ.pop(variable, None)
        self._borrowed.clear()

    def _end(self) -> None:
        """End the run, and say what is waited for and what is left to do."""
        run, self._run = self._run, None
        part, began = Path(run.dir).parent, time.monotonic()
        if self._online:
            _log.info("waiting for Weights & Biases to take what is left, %g s at most", self.finish_timeout)
        run.finish()
        if self._is_whole:
            _put_aside(part)
        if not self._online:
            _log.info("the run was tracked offline: send it with `wandb sync %s`", shlex.quote(str(part)))
        elif time.monotonic() - began >= self.finish_timeout:
            _log.warning("Weights & Biases did not take all of it in %g s: the rest is in %s", self.finish_timeout, part)

    def _wanted(self) -> str:
        """Return the mode that is asked for without asking wandb; empty if that decides it."""
        return self.mode or os.environ.get("WANDB_MODE", "").strip().lower()

    def _resolve_mode(self, wandb: Any) -> Mode:
        mode: Mode = _MODES.get(self._wanted() or wandb.setup().settings.mode, "online")
        if mode == "online" and _unanswered:
            _log.info("Weights & Biases did not answer an earlier run of this process: the run is tracked offline")
            return "offline"
        if mode == "online" and not has_key():
            _log.info("no Weights & Biases API key was found: the run is tracked offline")
            return "offline"
        return mode

    def _opened(self) -> bool:
        """Open the run at the first thing to show; tell whether there is one."""
        if self._open is not None:
            opening, self._open = self._open, None
            self._try("start", opening)
        return self._run is not None

    def _start(
        self,
        config: dict[str, Any],
        run_dir: Path,
        name: str | None,
        group: str | None,
        tags: Sequence[str],
        history: History,
    ) -> None:
        folder = str(run_dir.resolve() / "wandb")
        # What no setting of wandb's says: files that it would keep in the home folder, and its login's greeting.
        for variable, value in {"WANDB_DATA_DIR": folder, "WANDB_CACHE_DIR": folder, "WANDB_SILENT": "true"}.items():
            if variable not in os.environ:
                os.environ[variable] = value
                self._borrowed.append(variable)
        import wandb

        mode = self._resolve_mode(wandb)
        if mode == "disabled":
            return
        self._online = mode == "online"
        run_dir.mkdir(parents=True, exist_ok=True)
        if mode == "offline" and _was_sent(run_dir):
            _log.info("a part of this run was sent to Weights & Biases: the run goes on there as one of its own")
            (run_dir / _RUN_ID).unlink(missing_ok=True)
        settings = wandb.Settings(
            init_timeout=self.init_timeout,
            login_timeout=self.init_timeout,
            finish_timeout=self.finish_timeout,
            silent=True,
            console="off",
            # The run folder has the revision already; nobody's uncommitted code is sent anywhere.
            disable_code=True,
            disable_git=True,
        )
        experiment = experiment_name(run_dir)

        def open_run() -> Any:
            return wandb.init(
                project=self.project or project_by_default(),
                entity=self.entity,
                id=_run_id(run_dir),
                resume="allow" if mode == "online" else None,
                name=name or job_name(run_dir),
                group=group or sweep_name(run_dir),
                tags=[tag[:_MOST_TAG] for tag in dict.fromkeys([*tags, *([experiment] if experiment else [])])] or None,
                config=plain(config),
                allow_val_change=True,  # a run that goes on may have more generations or other stages
                dir=str(run_dir),
                mode=mode,
                reinit="finish_previous",  # the runs of a sweep share one process
                settings=settings,
            )

        done = list(history())
        self._wandb, self._run = wandb, open_run()
        self._sent = _last_generation(self._run)
        if self._sent > max((int(metrics["generation"]) for metrics in done), default=-1):
            # The search was begun anew in its folder: what W&B has is of another search, and stays.
            self._run.finish()
            (run_dir / _RUN_ID).unlink()
            self._run, self._sent = open_run(), -1
        run = self._run
        run.define_metric(AXES[0], summary="max")  # what `_last_generation` reads, whatever was logged last
        for axis in AXES[1:]:
            run.define_metric(axis)
        run.define_metric("*", step_metric=AXES[0])
        lacking = [metrics for metrics in done if int(metrics["generation"]) > self._sent]
        if len(lacking) > _MANY:
            _log.info("Weights & Biases gets the %s generations so far that it lacks, then the run goes on", f"{len(lacking):,}")
        for metrics in lacking:
            run.log(dict(metrics))
            self._sent = int(metrics["generation"])

    def _table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
        data = [plain(row) for row in rows]
        return self._wandb.Table(columns=list(columns), data=data, allow_mixed_types=True)

    def _log_artifact(self, name: str, type: str, paths: Sequence[Path]) -> None:
        artifact = self._wandb.Artifact(re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII)[:128], type=type)
        for path in paths:
            artifact.add_file(str(path), policy="immutable", skip_cache=True)  # sent from where it lies
        self._run.log_artifact(artifact)

    def _try(self, what: str, action: Callable[[], object]) -> None:
        """Do something that the run stands or falls with: if it fails, the tracker ends its run and is off."""
        began = time.monotonic()
        try:
            action()
        except (Exception, SystemExit) as error:  # whatever goes wrong there, the run goes on
            _warn(what, error, "the run goes on without it")
            self._is_whole = False
            if what == "start" and self._online and time.monotonic() - began >= _SLOW:
                _unanswered.add(what)
            if self._run is not None:
                try:
                    self._end()
                except (Exception, SystemExit) as again:
                    _log.debug("Weights & Biases failed to finish: %s", again)
                self._run = None

    def _try_one(self, what: str, action: Callable[[], object]) -> None:
        """Do something that may fail alone: the rest goes on, and what the service did not answer is not asked for again."""
        if what in self._given_up:
            return
        began = time.monotonic()
        try:
            action()
            self._is_whole = self._is_whole or what in _LAST
        except (Exception, SystemExit) as error:
            if not self._warned:
                _warn(what, error, "the rest is tracked on")
            self._warned = True
            if time.monotonic() - began >= _SLOW:
                self._given_up.add(what)


_unanswered: set[str] = set()
"""Not empty once the service let a run of this process wait in vain."""


def _warn(what: str, error: BaseException, then: str) -> None:
    reason = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())[:_MOST_REASON]
    name = type(error).__name__
    _log.warning("Weights & Biases failed to %s (%s): %s", what, f"{name}: {reason}" if reason else name, then)


def _was_sent(run_dir: Path) -> bool:
    """Tell if W&B has, or may have, a part of what a run folder tracks now."""
    parts = run_dir / "wandb"
    return any(parts.glob("offline-run-*/*.wandb.synced")) or any(parts.glob(f"run-*-{_run_id(run_dir)}"))


def _put_aside(part: Path) -> None:
    """Move what earlier parts wrote offline, and nobody sent, to where `wandb sync` does not find it."""
    for earlier in sorted(part.parent.glob("offline-run-*")):
        if earlier != part and not any(earlier.glob("*.wandb.synced")):
            aside = part.parents[1] / _EARLIER
            aside.mkdir(exist_ok=True)
            earlier.rename(aside / earlier.name)


def _last_generation(run: Any) -> int:
    """Return the last generation that a resumed run has at W&B, -1 if there is none: its summary is what W&B was sent."""
    if getattr(run, "resumed", False) is not True:
        return -1
    last = run.summary.get(AXES[0])
    if hasattr(last, "get"):
        last = last.get("max")
    return int(last) if isinstance(last, int | float) else -1


def _run_id(run_dir: Path) -> str:
    """Return the W&B id of a run folder: drawn once, kept beside what W&B writes there."""
    path = run_dir / _RUN_ID
    if not path.is_file() or not path.read_text(encoding="ascii", errors="replace").strip():  # or killed while it was written
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, secrets.token_hex(4).encode())
    return path.read_text(encoding="ascii").strip()


def project_by_default() -> str:
    """Return the project that wandb is set to, by WANDB_PROJECT or its settings, else evopress."""
    import wandb

    return wandb.setup().settings.project or PROJECT


def has_key() -> bool:
    """Tell if wandb can log in by itself, so that it never has to ask: to the server that its settings name."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import wandb

    settings = wandb.setup().settings
    if settings.api_key or settings.identity_token_file:
        return True
    machines = [urlsplit(settings.base_url).netloc]
    if settings.base_url == wandb.Settings().base_url:
        machines.append("api.wandb.ai")  # W&B's own, by which name keys were kept before it had another
    named = os.environ.get("NETRC")
    paths = [Path(named).expanduser()] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    try:
        logins = netrc.netrc(next(path for path in paths if path.exists()))
    except (OSError, StopIteration, netrc.NetrcParseError):
        return False
    return any(login[2] for machine in machines if (login := logins.authenticators(machine)) is not None)
