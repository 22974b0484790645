"""The arrows between rooms point one way, and each outside library stays in its room (STYLE.md)."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import evopress.__main__

PACKAGE = Path(evopress.__main__.__file__).parent
VOCABULARY = {"units", "currencies", "engines", "errors", "files", "json_files", "progress", "registry"}
MAY_IMPORT = {
    "errors": set(),
    "currencies": {"errors"},
    "engines": {"errors"},
    "units": {"currencies", "errors"},
    "files": {"errors"},
    "json_files": {"errors"},
    "progress": set(),
    "registry": {"errors"},
    "machine": set(),
    "ranks": {"errors"},
    "settings": {"errors", "search"},
    "run_folder": VOCABULARY | {"reporting"},
    "config": {"settings", "errors", "run_folder", "search"},
    "command_line": {"run_folder", "settings"},
    "search": VOCABULARY,
    "reporting": VOCABULARY | {"result_settings"},
    "compress": {"units", "errors", "machine"},
    "models": VOCABULARY | {"endings", "settings", "machine", "ranks"},
    "data": VOCABULARY | {"settings"},
    "resources": {"compress", "errors", "files", "progress", "ranks"},
    "levels": VOCABULARY | {"endings", "ranks", "resources", "compress", "models", "data"},
    "fitness": VOCABULARY | {"ranks", "compress", "models", "data", "levels"},
    "evaluation": VOCABULARY | {"ranks", "compress", "models", "data", "levels", "fitness"},
    "export": VOCABULARY | {"endings", "compress", "models", "data", "levels", "fitness"},
    "baselines": VOCABULARY | {"compress", "models", "data", "levels", "fitness", "search", "settings"},
    "endings": {"errors", "files"},
    "earlier_versions": set(),
    "result_settings": {"earlier_versions"},
    "methods": VOCABULARY | {"compress", "models", "levels", "settings"},
    "databases": VOCABULARY | {"compress", "models", "data", "levels", "methods", "settings"},
    "workspace": VOCABULARY
    | {"machine", "ranks", "resources", "endings", "models", "data", "databases", "levels", "fitness", "methods", "settings"},
    "stages": VOCABULARY
    | {"endings", "ranks", "resources", "compress", "models", "data", "levels", "fitness", "search", "settings"}
    | {"methods", "workspace", "baselines", "evaluation", "export", "reporting"},
    "finished": VOCABULARY
    | {"result_settings", "earlier_versions", "data", "levels", "reporting", "settings", "stages", "workspace"},
    "pipeline": VOCABULARY | {"finished", "methods", "reporting", "settings", "stages", "workspace"},
    "library": VOCABULARY
    | {"machine", "methods", "models", "data", "levels", "evaluation", "export", "reporting", "resources", "search", "settings"}
    | {"stages", "workspace"},
}
"""A room to the rooms beside itself that it may import; what is not named here (the entry point, launching) may import any."""
ONLY_IN = {
    "hydra": {"__main__", "config", "launching"},
    "joblib": {"launching"},
    "submitit": {"launching"},
    "hydra_plugins": {"launching"},
    "omegaconf": {"__main__", "config", "launching"},
    "wandb": {"reporting"},
    "pandas": {"reporting"},
    "matplotlib": {"reporting"},
    "lm_eval": {"evaluation"},
    "datasets": {"data"},
    "pickle": set(),
}
"""An outside library to the rooms that may import it."""


def imports(path: Path) -> Iterator[str]:
    """Yield the full name of everything that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent != PACKAGE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path: Path) -> None:
    room = room_of(path)
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top == "evopress":
            other = rest.split(".")[0]
            assert other == room or room not in MAY_IMPORT or other in MAY_IMPORT[room], f"{room} imports {name}"
            assert other != "__main__", f"{room} imports the entry point"
        assert room in ONLY_IN.get(top, {room}), f"{room} imports {name}"
        assert top not in ("experiments", "tests"), f"{room} imports {name}"


def test_no_room_imports_itself_through_others() -> None:
    arrows: dict[str, set[str]] = {}
    for path in FILES:
        names = (name.split(".") for name in imports(path) if name.startswith("evopress."))
        arrows.setdefault(room_of(path), set()).update(name[1] for name in names if name[1] != room_of(path))
    TopologicalSorter(arrows).prepare()  # a CycleError names the circle


def test_the_rules_name_rooms_that_exist() -> None:
    rooms = {room_of(path) for path in FILES}
    assert set(MAY_IMPORT) <= rooms
    assert set().union(*ONLY_IN.values()) <= rooms


@pytest.mark.parametrize("path", [path for path in FILES if room_of(path) in ("reporting", "export")], ids=str)
def test_what_shows_results_asks_the_currency_and_never_the_method(path: Path) -> None:
    """A space says what it counts and in which words; its method's name is written to files and read back, and no more."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare) and any(
            isinstance(part, ast.Attribute) and part.attr == "method" for part in ast.walk(node)
        ):
            assert path.name == "records.py", f"{path}:{node.lineno} asks for a method"


def test_search_has_no_torch() -> None:
    assert [path for path in FILES if room_of(path) == "search" and any(n.split(".")[0] == "torch" for n in imports(path))] == []


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("evopress.search.strategies", ("torch", "hydra", "transformers")),
        ("evopress.__main__", ("torch", "transformers", "wandb", "pandas", "matplotlib", "evopress.pipeline")),
    ],
)
def test_importing_stays_light(module: str, absent: tuple[str, ...]) -> None:
    """`--help` and shell completion wait for no torch, and the search runs without it."""
    code = f"import importlib, sys; importlib.import_module({module!r}); print([m for m in {absent!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("library", ["hydra", "omegaconf"])
def test_the_design_page_says_where_hydra_is(library: str) -> None:
    page = " ".join((PACKAGE.parent / "docs" / "design.md").read_text(encoding="utf-8").split())
    found = re.search(r"Hydra and OmegaConf stay in (.*?)\.", page)
    assert found and {name.rstrip("/") for name in re.findall(r"`([^`]+)`", found[1])} == ONLY_IN[library]
