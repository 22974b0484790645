"""What the documents show is there: files that they link to, commands that compose; results in the tree stay small."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from evopress import command_line
from evopress import config as configuration

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md")), *sorted((ROOT / "experiments").glob("**/README.md"))]
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"`([^`]+)`")
_MODULE = re.compile(r"\b(?!my_)[a-z_][\w/]*\.py\b")
_ELSEWHERE = "hydra.searchpath="
LARGEST_PICTURE = 130_000


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def lines_of_code(text: str) -> Iterator[str]:
    """Yield what stands in code: the lines of blocks, continued ones as one, and what is between backticks."""
    for block in _FENCE.findall(text):
        yield from block.replace("\\\n", " ").splitlines()
    yield from (" ".join(found.split()) for found in _INLINE.findall(_FENCE.sub("", text)))


def commands(program: str) -> list[tuple[str, str]]:
    """Return the document and the line of every command of `program`; what needs configs that lie elsewhere cannot be tried."""
    found = ((name_of(path), line.strip()) for path in DOCUMENTS for line in lines_of_code(path.read_text(encoding="utf-8")))
    return sorted(
        {
            (document, line)
            for document, line in found
            if line.startswith(program) and _ELSEWHERE not in line and line.strip() != "python -m evopress"
        }
    )


@pytest.mark.parametrize("document", [name_of(path) for path in DOCUMENTS])
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    links = [link.partition("#")[0] for link in _LINK.findall(path.read_text(encoding="utf-8")) if "://" not in link]
    assert not [link for link in links if link and not (path.parent / link).exists()]


def anchors_of(path: Path) -> set[str]:
    """Return what GitHub and mkdocs call a page's headings in links."""
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", [name_of(path) for path in DOCUMENTS])
def test_anchors_are_headings(document: str) -> None:
    path = ROOT / document
    links = [link.partition("#") for link in _LINK.findall(path.read_text(encoding="utf-8")) if "://" not in link]
    pages = [(path.parent / page if page else path, anchor) for page, _, anchor in links if anchor]
    assert not [(page.name, anchor) for page, anchor in pages if page.suffix == ".md" and anchor not in anchors_of(page)]


def test_sentences_that_are_explained_are_said() -> None:
    """What the page to start from quotes of refusals is in the code: Python's own sentence aside."""
    page = (ROOT / "docs" / "start.md").read_text(encoding="utf-8").partition("| what is said |")[2].partition("\n\n")[0]
    quoted = [quote for line in page.splitlines()[2:] for quote in re.findall(r"`([^`]+)`", line.split(" | ")[0])]
    code = " ".join(path.read_text(encoding="utf-8") for path in (ROOT / "evopress").rglob("*.py"))
    code = re.sub(r"\"\s+f?\"", "", code)  # a sentence over several lines is one
    assert len(quoted) > 10
    assert [quote for quote in quoted if quote not in code] == ["No module named 'hydra'"]


@pytest.mark.parametrize("document", [name_of(path) for path in DOCUMENTS])
def test_modules_that_are_named_are_there(document: str) -> None:
    """`my_….py` is a reader's own."""
    there = {
        path.relative_to(ROOT).as_posix() for room in ("evopress", "experiments", "tests") for path in (ROOT / room).rglob("*.py")
    }
    named = set(_MODULE.findall((ROOT / document).read_text(encoding="utf-8")))
    assert not [name for name in named if not any(f"/{path}".endswith(f"/{name}") for path in there)]


def test_commands_are_found() -> None:
    """Or the tests below would hold for nothing."""
    assert {document for document, _ in commands("python -m evopress")} >= {
        *("README.md", "docs/methods.md", "docs/running.md", "docs/gpus.md", "docs/sweeps.md", "docs/start.md")
    }
    assert len(commands("python -m evopress")) > 40 and len(commands("python -m experiments.")) > 20


@pytest.mark.parametrize(("document", "command"), commands("python -m evopress"))
def test_commands_compose(document: str, command: str) -> None:
    """As they are typed, a sweep's first job for the sweep; `resume=` brings its own method, so one is put in its place."""
    typed = shlex.split(command.replace("=NAME", "=table4").replace("--cfg job", "--cfg=job"), comments=True)[3:]
    given = [argument for argument in typed if not argument.startswith(("-", "resume=", "..."))]
    overrides = [_first_of_a_sweep(argument) for argument in command_line.prepared(given)]
    if any(argument.startswith("resume=") for argument in typed):
        overrides = ["+method=quant", *overrides]
    configuration.register()
    with initialize_config_dir(version_base="1.3", config_dir=str(configuration.config_folder())):
        config = compose("config", overrides=overrides)
        if {"--help", "--version", "--hydra-help"}.isdisjoint(typed):
            assert configuration.to_settings(config).stages


def test_the_demo_says_how_to_go_on() -> None:
    """It has made an environment, which no further command finds before it is activated; what it says composes."""
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\ndemo:")[2].partition("\n\n")[0]
    found = re.search(r"\. \$\(VENV\)/bin/activate && (python -m evopress [^(]+)", recipe.splitlines()[-1])
    assert found, "the last line of make demo"
    test_commands_compose("Makefile", found[1])
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert ". .venv/bin/activate\npython -m evopress" in readme


def _first_of_a_sweep(argument: str) -> str:
    override = OverridesParser.create().parse_override(argument)
    if not override.is_sweep_override():
        return argument
    return f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}"


@pytest.mark.parametrize(("document", "command"), commands("python -m experiments."))
def test_commands_of_experiments_are_there(document: str, command: str) -> None:
    module = command.split()[2]
    assert "NAME" in module or importlib.util.find_spec(module) is not None


def test_the_site_has_every_guide() -> None:
    """`make docs`, as far as it can be checked without mkdocs."""
    site = yaml.safe_load((ROOT / "docs" / "mkdocs.yml").read_text(encoding="utf-8"))
    named = [path for entry in site["nav"] for path in entry.values()]
    assert sorted(named) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    assert "docs:" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_extras_are_installed_from_the_clone() -> None:
    """No registry has a package of this name, so that advice to install it from one would fail, or fetch another's."""
    rooms = (("evopress", "py"), ("experiments", "py"), ("tests", "py"), ("conf", "yaml"))
    read = [*DOCUMENTS, *(path for room, ending in rooms for path in (ROOT / room).rglob(f"*.{ending}"))]
    by_name = re.compile(r"pip install (?:-\S+ )*'?evopress\b")
    assert not [name_of(path) for path in read if by_name.search(path.read_text(encoding="utf-8"))]


def test_results_in_the_tree_are_small() -> None:
    """A CSV, a table and one PNG an experiment; HTML and SVG are made by a command."""
    done = subprocess.run(["git", "ls-files", "experiments"], cwd=ROOT, capture_output=True, text=True, check=False)
    paths = [ROOT / line for line in done.stdout.splitlines()]
    if done.returncode or not paths:
        pytest.skip("no git checkout")
    assert not [name_of(path) for path in paths if path.suffix in (".html", ".svg", ".pdf")]
    pictures = [path for path in paths if path.suffix in (".png", ".jpg") and path.exists()]
    assert not {name: count for name, count in Counter(path.relative_to(ROOT).parts[1] for path in pictures).items() if count > 1}
    assert not [name_of(path) for path in pictures if path.stat().st_size > LARGEST_PICTURE]
