"""The tracker follows a run and never gets in its way."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import pytest

from evopress.errors import EvoPressError
from evopress.reporting import tracker
from evopress.reporting.figures import level_profile
from evopress.reporting.tracker import NullTracker, Tracker, WandbTracker
from evopress.units import Space


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setattr(tracker, "_unanswered", set())


class Settings(types.SimpleNamespace):
    """What wandb is set to where nobody set anything."""

    def __init__(self, **given: Any) -> None:
        none = dict.fromkeys(("project", "entity", "api_key", "identity_token_file"))
        super().__init__(**{**none, "mode": "online", "base_url": "https://api.wandb.ai", **given})


def follow(tracker: Tracker, run_dir: Path, figure: Path, files: list[Path]) -> None:
    tracker.start(config={"bits": 2.5, "path": run_dir}, run_dir=run_dir, name="a run", group="g", tags=["quant"])
    for generation in range(3):
        tracker.log({"kl": 1.0 / (generation + 1), "tokens": 512.0 * generation}, generation=generation)
    tracker.table("results", ["name", "kl"], [["dense", None], ["dp", 1], ["evopress", 0.5]])
    tracker.figure("profile", figure)
    tracker.artifact("genome of a run/2.5", "genome", files)
    tracker.finish()


@pytest.fixture
def figure(tmp_path: Path, space: Space) -> Path:
    return level_profile(space, {"a": (0,) * len(space)}, tmp_path / "figures")[0]


class FakeWandb(types.ModuleType):
    """A wandb in which every call is recorded and the chosen one fails."""

    def __init__(self, failing: str = "") -> None:
        super().__init__("wandb")
        self.failing = failing
        self.calls: list[tuple[str, Any]] = []
        self.settings = Settings()
        self.dir = "wandb/offline-run-1-x/files"

    def setup(self) -> FakeWandb:
        return self

    def Settings(self, **options: Any) -> Settings:
        return Settings()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments: Any, **options: Any) -> Any:
            self.calls.append((name, options or arguments))
            if name == self.failing:
                raise RuntimeError("the service is on fire\nwith a long traceback")
            return self if name in ("init", "Artifact") else None

        return call

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


def test_importing_the_room_imports_nothing_heavy() -> None:
    code = """
        import sys
        from evopress.reporting import figures, records, report, tables, tracker
        tracker.NullTracker().log({"kl": 1.0}, generation=0)
        tracker.WandbTracker("disabled").start(config={}, run_dir=None, name=None, group=None, tags=())
        print(sorted({"wandb", "pandas", "matplotlib", "numpy", "torch", "hydra"} & set(sys.modules)))
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_null_tracker_leaves_nothing_behind(tmp_path: Path) -> None:
    follow(NullTracker(), tmp_path / "run", tmp_path / "none.png", [])
    assert not (tmp_path / "run").exists()


def in_a_process(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code as a program of its own, with an empty home and no way out but a closed port."""
    home = folder / "home"
    home.mkdir()
    nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    homes = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"), str(home))
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(folder)],
        cwd=home,
        env=os.environ | nowhere | homes | paths | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


PROGRAM = """
    import logging, os, sys
    from pathlib import Path
    from evopress.reporting.tracker import WandbTracker
    logging.basicConfig(format="%(message)s")
    logging.getLogger("evopress").setLevel(logging.INFO)
    folder = Path(sys.argv[1])
    tracker = WandbTracker("online", "evopress", init_timeout=3, finish_timeout=3)
    tracker.start(config={"bits": 2.5}, run_dir=folder / "run", name="a run", group="g", tags=["quant"])
    for generation in range(3):
        tracker.log({"kl": 1 / (generation + 1), "tokens": 512.0}, generation=generation)
    tracker.table("results", ["name", "kl"], [["dense", None], ["dp", 1], ["evopress", 0.5]])
    tracker.figure("profile", folder / "figure.png")
    tracker.artifact("genome of a run/2.5", "genome", [folder / "genome.txt"])
    tracker.finish()
    print(sorted(name for name in os.environ if name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_SILENT")))
"""


@pytest.fixture
def folder(tmp_path: Path, figure: Path) -> Path:
    folder = tmp_path / "process"
    folder.mkdir()
    (folder / "genome.txt").write_text("a: 3\n")
    (folder / "figure.png").write_bytes(figure.read_bytes())
    return folder


def test_offline_run_is_written_below_the_run_folder_alone(folder: Path) -> None:
    result = in_a_process(PROGRAM, folder)
    assert (result.returncode, result.stdout) == (0, "[]\n")
    (record,) = (folder / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert result.stderr.splitlines() == [
        "no Weights & Biases API key was found: the run is tracked offline",
        f"the run was tracked offline: send it with `wandb sync {record.parent}`",
    ]
    content = record.read_bytes()
    for word in (b"generation", b"tokens", b"seconds", b"genome-of-a-run-2.5", b"a run", b"results", b"profile"):
        assert word in content
    assert os.listdir(folder / "run") == ["wandb"]
    assert not [path for path in (folder / "home").rglob("*") if path.is_file()]


def test_a_service_out_of_reach_ends_no_run_and_holds_none_up(folder: Path) -> None:
    result = in_a_process(PROGRAM, folder, WANDB_API_KEY="0123456789" * 4, WANDB_BASE_URL="http://127.0.0.1:9")
    (warning,) = result.stderr.splitlines()
    assert warning.startswith("Weights & Biases failed to start")
    assert warning.endswith("the run goes on without it")
    assert (result.returncode, result.stdout) == (0, "[]\n")


@pytest.mark.parametrize("failing", ["init", "define_metric", "log", "finish"])
def test_a_failure_is_told_once_and_ends_the_run(
    tmp_path: Path, figure: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failing: str
) -> None:
    fake = FakeWandb(failing)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    follow(WandbTracker("offline"), tmp_path / "run", figure, [figure])
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    told = "(RuntimeError: the service is on fire; with a long traceback): the run goes on without it"
    assert warning.message.endswith(told)
    assert fake.names()[-1] == ("init" if failing == "init" else "finish")


@pytest.mark.parametrize("failing", ["Table", "Image", "Artifact"])
@pytest.mark.parametrize("slow", [False, True])
def test_what_fails_alone_is_told_once_and_the_rest_goes_on(
    tmp_path: Path, figure: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failing: str, slow: bool
) -> None:
    fake = FakeWandb(failing)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(tracker, "_SLOW", 0.0 if slow else 60.0)
    followed = WandbTracker("offline")
    followed.start(config={}, run_dir=tmp_path / "run", name="a run", group="g", tags=["quant"])
    for _ in range(2):
        followed.table("results", ["kl"], [[1]])
        followed.figure("profile", figure)
        followed.artifact("genome", "genome", [figure])
    followed.log({"kl": 1.0}, generation=0)
    followed.finish()
    (warning,) = caplog.records
    assert warning.message.endswith("(RuntimeError: the service is on fire; with a long traceback): the rest is tracked on")
    names = fake.names()
    assert {name: names.count(name) for name in ("Table", "Image", "Artifact")} == {
        name: 1 if slow and name == failing else 2 for name in ("Table", "Image", "Artifact")
    }
    assert fake.calls[-2:] == [("log", ({"kl": 1.0, "generation": 0},)), ("finish", ())]


def test_after_a_service_that_did_not_answer_the_process_tracks_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeWandb("init")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_API_KEY", "k")
    monkeypatch.setattr(tracker, "_SLOW", 0.0)
    begun(WandbTracker(), tmp_path / "first")
    fake.failing = ""
    begun(WandbTracker(), tmp_path / "second")
    assert [options["mode"] for name, options in fake.calls if name == "init"] == ["online", "offline"]


def test_a_missing_wandb_is_told_once(
    tmp_path: Path, figure: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    follow(WandbTracker("offline"), tmp_path / "run", figure, [figure])
    assert ["failed to start" in record.message for record in caplog.records] == [True]


def test_everything_is_sent_with_its_axes(tmp_path: Path, figure: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    follow(WandbTracker("offline", "p", "e"), tmp_path / "run", figure, [figure])
    options = dict(fake.calls)["init"]
    assert (options["project"], options["entity"], options["mode"], options["dir"]) == (
        "p",
        "e",
        "offline",
        str(tmp_path / "run"),
    )
    assert options["config"] == {"bits": 2.5, "path": str(tmp_path / "run")}
    axes = [call for name, call in fake.calls if name == "define_metric"]
    assert axes == [{"summary": "max"}, ("tokens",), ("seconds",), {"step_metric": "generation"}]
    logged = [call[0] for name, call in fake.calls if name == "log"]
    assert logged[2] == {"kl": 1 / 3, "tokens": 1024.0, "generation": 2}
    assert fake.names()[-2:] == ["log_artifact", "finish"]


def started(run_dir: Path, monkeypatch: pytest.MonkeyPatch, mode: Any = "offline", **options: Any) -> dict[str, Any]:
    """Start a tracker in a run folder and return what wandb was asked for."""
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tracker = WandbTracker(mode)
    tracker.start(**{"config": {}, "run_dir": run_dir, "name": None, "group": None, "tags": ["quant"], **options})
    tracker.log({}, generation=0)
    tracker.finish()
    asked: dict[str, Any] = dict(fake.calls)["init"]
    return asked


def test_jobs_of_a_sweep_are_a_group_tagged_by_their_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tmp_path / "multirun" / "table4" / "constant_3_seed-1"
    (job / ".hydra").mkdir(parents=True)
    (job.parent / "multirun.yaml").touch()
    (job / ".hydra" / "overrides.yaml").write_text("- search.max_switches=3\n- seed=1\n- +experiment=table4\n")
    asked = started(job, monkeypatch)
    assert (asked["group"], asked["name"], asked["tags"]) == ("table4", "constant_3_seed-1", ["quant", "table4"])
    asked = started(job, monkeypatch, name="mine", group="ours", tags=["a", "table4"])
    assert (asked["group"], asked["name"], asked["tags"]) == ("ours", "mine", ["a", "table4"])
    asked = started(tmp_path / "alone", monkeypatch)
    assert (asked["group"], asked["name"], asked["tags"]) == (None, None, ["quant"])


def test_a_resumed_run_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k")
    first, again, other = (started(tmp_path / name, monkeypatch, "online") for name in ("a", "a", "b"))
    assert first["id"] == again["id"] != other["id"]
    assert (first["resume"], first["allow_val_change"]) == ("allow", True)
    offline = started(tmp_path / "a", monkeypatch)
    assert (offline["id"], offline["resume"]) == (first["id"], None)
    assert (tmp_path / "a" / "wandb" / "run_id.txt").read_text() == first["id"]


def begun(tracker: WandbTracker, run_dir: Path) -> None:
    tracker.start(config={}, run_dir=run_dir, name=None, group=None, tags=())
    tracker.log({}, generation=0)


@pytest.mark.parametrize(
    ("mode", "environment", "expected"),
    [
        ("online", {}, "offline"),
        ("online", {"WANDB_API_KEY": "k"}, "online"),
        ("offline", {"WANDB_API_KEY": "k"}, "offline"),
        (None, {}, "offline"),
        (None, {"WANDB_API_KEY": "k"}, "online"),
        (None, {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        (None, {"WANDB_MODE": "disabled"}, None),
        ("offline", {"WANDB_MODE": "disabled"}, "offline"),
        ("disabled", {"WANDB_API_KEY": "k"}, None),
    ],
)
def test_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Any, environment: dict[str, str], expected: str | None
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    begun(WandbTracker(mode), tmp_path)
    assert dict(fake.calls).get("init", {}).get("mode") == expected


@pytest.mark.parametrize(
    ("machine", "base_url", "mode"),
    [
        ("api.wandb.ai", "https://api.wandb.ai", "online"),
        ("api.wandb.ai", "https://wandb.example.org:8443", "offline"),
        ("wandb.example.org", "https://wandb.example.org:8443", "offline"),
        ("wandb.example.org:8443", "https://wandb.example.org:8443", "online"),
    ],
)
def test_a_netrc_entry_of_the_server_is_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str, base_url: str, mode: str
) -> None:
    fake = FakeWandb()
    fake.settings = Settings(base_url=base_url)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (tmp_path / "no-netrc").write_text(f"machine {machine} login user password made-up\n")
    begun(WandbTracker(), tmp_path)
    assert dict(fake.calls)["init"]["mode"] == mode


@pytest.mark.parametrize(
    ("settings", "given", "expected"),
    [({}, None, "evopress"), ({"project": "foo"}, None, "foo"), ({"project": "foo"}, "ours", "ours")],
)
def test_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Any, given: str | None, expected: str) -> None:
    fake = FakeWandb()
    fake.settings = Settings(**settings)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    begun(WandbTracker("offline", given), tmp_path)
    assert dict(fake.calls)["init"]["project"] == expected


@pytest.mark.parametrize(
    ("said", "mode", "expected"),
    [("offline", None, "offline"), ("disabled", None, None), ("disabled", "online", "online"), ("offline", "disabled", None)],
)
def test_wandb_offline_holds_where_no_mode_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, mode: Any, expected: str | None
) -> None:
    fake = FakeWandb()
    fake.settings = Settings(mode=said)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_API_KEY", "k")
    begun(WandbTracker(mode), tmp_path / "run")
    assert dict(fake.calls).get("init", {}).get("mode") == expected
    assert (tmp_path / "run").exists() == (expected is not None)


def test_wandbs_own_settings_are_taken(folder: Path) -> None:
    """`wandb login --host` and `wandb offline` write files, which wandb reads itself."""
    code = """
        import sys
        from pathlib import Path
        from evopress.reporting.tracker import WandbTracker, has_key
        Path("wandb").mkdir()
        Path("wandb/settings").write_text("[default]\\nbase_url = http://127.0.0.1:9\\nmode = offline\\nproject = foo\\n")
        Path(".netrc").write_text("machine 127.0.0.1:9\\n login user\\n password " + "k" * 40 + "\\n")
        tracker = WandbTracker()
        tracker.start(config={}, run_dir=Path(sys.argv[1]) / "run", name="n", group=None, tags=())
        tracker.log({"kl": 1.0}, generation=0)
        print(has_key(), tracker._online, tracker._run.project)
        tracker.finish()
    """
    result = in_a_process(code, folder, NETRC="")
    assert (result.stdout, result.stderr) == ("True False foo\n", "")
    assert len(list((folder / "run" / "wandb").glob("offline-run-*"))) == 1


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(EvoPressError, match="'onlin' is unknown: choose one of online, offline, disabled"):
        WandbTracker("onlin")  # type: ignore[arg-type]


class Service(types.ModuleType):
    """A wandb whose runs go to a service that keeps them by id, like W&B: history, and a summary of the last values."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: dict[str, list[dict[str, float]]] = {}
        self.summaries: dict[str, dict[str, Any]] = {}
        self.opened: list[dict[str, Any]] = []

        self.settings = Settings()

    def setup(self) -> Service:
        return self

    def Image(self, path: str) -> str:
        return path

    def Settings(self, **options: Any) -> Settings:
        return Settings()

    def init(self, **options: Any) -> Any:
        self.opened.append(options)
        name, online = options["id"], options["mode"] == "online"
        part = Path(options["dir"]) / "wandb" / f"{'' if online else 'offline-'}run-{len(self.opened)}-{name}"
        (part / "files").mkdir(parents=True)
        (part / f"run-{name}.wandb").touch()
        resumed = online and name in self.runs
        if not resumed:
            self.runs[name], self.summaries[name] = [], {}
        history, summary = self.runs[name], self.summaries[name]

        def log(row: dict[str, float]) -> None:
            history.append(row)
            summary.update({key: value for key, value in row.items() if key != "generation"})
            if "generation" in row:
                summary["generation"] = {"max": max(row["generation"], summary.get("generation", {"max": -1})["max"])}

        done = lambda *_, **__: None  # noqa: E731
        return types.SimpleNamespace(
            resumed=resumed, summary=summary, log=log, define_metric=done, finish=done, dir=str(part / "files")
        )

    def generations(self, name: str) -> list[float]:
        return [row["generation"] for row in self.runs[name] if "fitness" in row]

    def lose(self, name: str, count: int) -> None:
        """Lose the last rows, as where a run was killed before they were sent."""
        self.runs[name][-count:] = []
        last = max((row["generation"] for row in self.runs[name]), default=-1)
        self.summaries[name]["generation"] = {"max": last}


def part(run_dir: Path, mode: Any, done: int, until: int, *, lines: bool = False, reported: bool = False) -> None:
    """Follow a search that has `done` generations behind it when it is opened, up to the generation `until`."""
    rows: list[dict[str, float]] = [{"generation": i, "fitness": 1.0 / (i + 1)} for i in range(done)]
    tracker = WandbTracker(mode)
    tracker.start(config={}, run_dir=run_dir, name="n", group=None, tags=(), history=lambda: rows)
    for generation in range(done, until):
        rows.append({"generation": generation, "fitness": 1.0 / (generation + 1)})
        tracker.log({"fitness": 1.0 / (generation + 1)}, generation=generation)
    if lines:
        tracker.lines({"baseline/dp/kl": 1.5}, axes=[{"generation": 0, "tokens": 10}, {"generation": until - 1, "tokens": 90}])
        tracker.summarize({"best/kl": 0.5, "final/evopress/kl": 0.6})
    if reported:
        tracker.figure("convergence", run_dir / "convergence.png")
    tracker.finish()


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    service = Service()
    monkeypatch.setitem(sys.modules, "wandb", service)
    monkeypatch.setenv("WANDB_API_KEY", "k")
    return service


@pytest.mark.parametrize("mode", ["online", "offline"])
@pytest.mark.parametrize(
    ("cut", "lost"), [(3, 0), (3, 2), (3, 3), (6, 0), (6, 4)], ids=["all sent", "two lost", "none sent", "finished", "its end lost"]
)
def test_a_resumed_run_has_each_generation_once(tmp_path: Path, service: Service, mode: Any, cut: int, lost: int) -> None:
    part(tmp_path, mode, 0, cut)
    (name,) = service.runs
    if lost:
        service.lose(name, lost)
    part(tmp_path, mode, cut, 6, lines=True)
    assert list(service.runs) == [name]
    assert service.generations(name) == [0, 1, 2, 3, 4, 5]
    part(tmp_path, mode, 6, 6, lines=True)  # evaluated again
    assert service.generations(name) == [0, 1, 2, 3, 4, 5]
    lines = [row for row in service.runs[name] if "baseline/dp/kl" in row]
    assert {(row["generation"], row["tokens"], row["baseline/dp/kl"]) for row in lines} == {(0, 10, 1.5), (5, 90, 1.5)}
    assert (service.summaries[name]["best/kl"], service.summaries[name]["final/evopress/kl"]) == (0.5, 0.6)


def test_what_is_sent_of_a_long_run_before_it_goes_on_is_said(
    tmp_path: Path, service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "evopress")
    part(tmp_path, "online", 0, 3)
    part(tmp_path, "online", 3, 4)
    assert "gets the" not in caplog.text
    part(tmp_path, "online", 1003, 1004)
    assert "gets the" not in caplog.text, "it has some of them"
    part(tmp_path, "offline", 2004, 2005)
    assert "gets the 2,005 generations so far that it lacks" in caplog.text


def test_a_search_begun_anew_in_its_folder_is_another_run(tmp_path: Path, service: Service) -> None:
    part(tmp_path, "online", 0, 5)
    part(tmp_path, "online", 0, 3)
    first, second = service.runs
    assert service.generations(first) == [0, 1, 2, 3, 4]
    assert service.generations(second) == [0, 1, 2]
    part(tmp_path, "online", 3, 4)
    assert list(service.runs) == [first, second] and service.generations(second) == [0, 1, 2, 3]


def parts(run_dir: Path) -> list[str]:
    """Return the files that `wandb sync` finds in a run folder."""
    return sorted(path.parent.name for path in (run_dir / "wandb").glob("*/*.wandb"))


def test_a_later_offline_part_takes_the_place_of_earlier_ones(
    tmp_path: Path, service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "evopress")
    part(tmp_path, "offline", 0, 3)
    (name,) = service.runs
    part(tmp_path, "offline", 3, 6, reported=True)
    assert parts(tmp_path) == [f"offline-run-2-{name}"]
    assert [path.name for path in (tmp_path / "wandb" / "earlier").iterdir()] == [f"offline-run-1-{name}"]
    assert caplog.messages[-1].endswith(f"send it with `wandb sync {tmp_path / 'wandb' / f'offline-run-2-{name}'}`")


def test_until_the_later_part_is_whole_the_earlier_ones_stay(tmp_path: Path, service: Service) -> None:
    part(tmp_path, "offline", 0, 3)
    begun(WandbTracker("offline"), tmp_path)  # killed
    assert len(parts(tmp_path)) == 2
    part(tmp_path, "offline", 3, 6)  # without the report
    assert len(parts(tmp_path)) == 3
    part(tmp_path, "offline", 6, 6, reported=True)
    assert len(parts(tmp_path)) == 1


def test_a_part_that_fails_hides_no_earlier_one(tmp_path: Path, service: Service) -> None:
    part(tmp_path, "offline", 0, 3, reported=True)
    tracker = WandbTracker("offline")
    begun(tracker, tmp_path)
    tracker.figure("convergence", tmp_path / "convergence.png")
    tracker._run.log = lambda row: 1 / 0
    tracker.log({"fitness": 1.0}, generation=9)
    tracker.finish()
    assert len(parts(tmp_path)) == 2


@pytest.mark.parametrize("sent", ["by hand", "online"])
def test_an_offline_part_of_a_run_that_was_sent_is_a_run_of_its_own(tmp_path: Path, service: Service, sent: str) -> None:
    part(tmp_path, "online" if sent == "online" else "offline", 0, 3)
    (name,) = service.runs
    if sent == "by hand":
        (tmp_path / "wandb" / f"offline-run-1-{name}" / f"run-{name}.wandb.synced").touch()
    part(tmp_path, "offline", 3, 6)
    first, second = service.runs
    assert service.generations(first) == [0, 1, 2] and service.generations(second) == [0, 1, 2, 3, 4, 5]
    assert len(parts(tmp_path)) == 2


def test_nothing_is_opened_before_there_is_something_to_show(tmp_path: Path, service: Service) -> None:
    tracker = WandbTracker("online")
    tracker.start(config={}, run_dir=tmp_path / "run", name="n", group=None, tags=())
    tracker.lines({}, axes=[{"generation": 0}])
    tracker.finish()
    tracker.log({"fitness": 1.0}, generation=0)  # after its end there is nothing to open either
    assert service.opened == [] and not (tmp_path / "run").exists()


def test_a_damaged_record_turns_it_off(tmp_path: Path, service: Service, caplog: pytest.LogCaptureFixture) -> None:
    def history() -> Any:
        raise EvoPressError("record 3 of metrics.jsonl is damaged")

    tracker = WandbTracker("online")
    tracker.start(config={}, run_dir=tmp_path, name="n", group=None, tags=(), history=history)
    tracker.log({"fitness": 1.0}, generation=0)
    tracker.log({"fitness": 1.0}, generation=1)
    (warning,) = caplog.records
    assert "record 3 of metrics.jsonl is damaged" in warning.message


def test_an_id_that_was_cut_off_is_drawn_again(tmp_path: Path) -> None:
    first = tracker._run_id(tmp_path)
    assert first == tracker._run_id(tmp_path) and len(first) == 8
    (tmp_path / tracker._RUN_ID).write_text("")
    assert len(tracker._run_id(tmp_path)) == 8
