"""Write one HTML page about a sweep, finished or not: its claim, table, convergence, heat maps, jobs and cost.

    python -m evopress +experiment=table4
    python -m experiments.sweep_report table4 [--root multirun]

reads <root>/table4, makes its table and figures as `experiments.tables` and `experiments.convergence` do, and writes report.html
beside them. The folder of any other sweep can be named too, and is then written into. The page holds all that it shows; its links
to the jobs' own reports are relative, for where the sweep was run.
"""

from __future__ import annotations

import os
import re
import shlex
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from evopress.errors import EvoPressError
from evopress.progress import duration, in_bytes
from evopress.reporting.page import (
    code,
    details,
    pairs,
    paragraph,
    pictures,
    section,
    show,
    table,
    write_page,
)
from evopress.reporting.tables import display_name, held_out_kl, number, significant
from experiments.commands import of_sweep
from experiments.convergence import draw_sweep, make_figures
from experiments.markdown import markdown
from experiments.specs import SPECS, Spec
from experiments.sweeps import Job, Sweep, command_of_folder, describe
from experiments.tables import BEGIN, END, command_of, make_table, make_table_of

_JOB_FIGURES = ("dropped_modules", "level_heatmap", "level_profile", "switches", "selection", "lineage")


def make_report(experiment: str, *, root: Path, out: Path) -> tuple[Sweep, Path]:
    """Read a sweep, make its table and figures, and write its page; return the sweep and the page's path.

    Args:
        root: folder that holds the sweeps' folders.
        out: folder of the experiment, with its README; the page is written there.

    Raises: EvoPressError if no job has finished, or the jobs do not belong together.
    """
    spec, sweep = SPECS[experiment], make_table(experiment, root=root, out=out)
    try:
        curves, why_not = make_figures(experiment, root=root, out=out)[1], ""
    except EvoPressError as error:  # no search has measured anything on the way
        curves, why_not = [], str(error)
    commands = [command_of(experiment), f"python -m experiments.sweep_report {experiment}"]
    return sweep, _write_page(sweep, spec, out, curves=curves, why_not=why_not, commands=commands)


def make_report_of(folder: Path, *, out: Path) -> tuple[Sweep, Path]:
    """Read the folder of any sweep, make its tables and figures, and write its page; return the sweep and the page's path.

    Raises: EvoPressError if no job has finished.
    """
    sweep, spec = make_table_of(folder, out=out)
    curves = draw_sweep(sweep, spec, out)
    why_not = "" if curves else "No search measured anything on the way: evaluation.every is 0, or nothing was searched."
    commands = [*filter(None, [command_of_folder(folder)]), f"python -m experiments.sweep_report {shlex.quote(str(folder))}"]
    return sweep, _write_page(sweep, spec, out, curves=curves, why_not=why_not, commands=commands)


def _write_page(sweep: Sweep, spec: Spec, out: Path, *, curves: Sequence[Path], why_not: str, commands: Sequence[str]) -> Path:
    """Write the page of a sweep whose table is in `out`; return its path."""
    claim, shows = _readme(out / "README.md")
    found = (out / "table.md").read_text(encoding="utf-8").partition("\n")[2]
    parts = [
        section("What was asked", markdown(claim)),
        section("What is missing", _missing(sweep)),
        section("What was found", markdown(found) + markdown(shows)),
        section("Convergence", "".join(pictures(curves).values()) + paragraph(_CURVES if curves else why_not, kind="note")),
        section("Where the budget went, and how", _variants(sweep, spec)),
        section("Jobs", _jobs(sweep, out)),
        section("What it cost", _costs(sweep, spec)),
        section("Run it again", code("\n".join(commands)) + paragraph(_AGAIN)),
        section("Environment", _environment(sweep.jobs)),
    ]
    path = out / "report.html"
    write_page(path, title=spec.title, parts=parts)
    return path


class SweepPage:
    """Hydra's callback, hydra/callbacks=page: write a sweep's tables, figures and page into its folder when it ends."""

    def on_multirun_end(self, config: Any, **_: Any) -> None:
        """Write them, as far as jobs have finished."""
        folder = Path(str(config.hydra.sweep.dir))
        try:
            print(f"the sweep's page: {make_report_of(folder, out=folder)[1]}", flush=True)
        except EvoPressError as error:
            print(f"no page of the sweep: {error}", flush=True)

    def _nothing(self, **_: Any) -> None:
        """Single runs and jobs have reports of their own."""

    on_multirun_start = on_run_start = on_run_end = on_job_start = on_job_end = on_compose_config = _nothing


_AGAIN = "The first command goes on where the sweep was cut off, the last makes this page."
_CURVES = "Lines are means over seeds, bands their range; curves and lines are of one held-out text."


def _readme(path: Path) -> tuple[str, str]:
    """Return what a README says before its table and after it, without its title and pictures."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    return tuple(re.sub(r"^(# .*|!\[.*)$", "", part, flags=re.MULTILINE).strip() for part in (before, after))  # type: ignore[return-value]


def _missing(sweep: Sweep) -> str:
    """Say what is not there yet; nothing where all is."""
    if not sweep.missing and not sweep.unfinished:
        return ""
    total = len(sweep.jobs) + len(sweep.missing)
    said = paragraph(f"{len(sweep.jobs)} of {total} jobs have finished; all numbers on this page are of these alone.")
    items = [f"not finished: {describe(axes)}" for axes in sweep.missing]
    items += [f"left out: {folder.name}: {reason}" for folder, reason in sweep.unfinished]
    return said + f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"


def _variants(sweep: Sweep, spec: Spec) -> str:
    """Show the figures of one job per group and variant, folded away but for the first."""
    shown: dict[str, Job] = {}
    for job in sweep.jobs:
        variant = spec.variant(job.axes, "evopress")
        if variant is not None and any((job.folder / "figures").glob("level_heatmap.*")):
            where = describe({key: job.axes[key] for key in spec.group})
            shown.setdefault(", ".join(filter(None, (display_name(variant), where))), job)
    parts: list[str] = []
    for name, job in shown.items():
        found = pictures([job.folder / "figures" / f"{figure}{suffix}" for figure in _JOB_FIGURES for suffix in (".svg", ".png")])
        body = paragraph(f"One job of several seeds: {describe(job.axes)}.", kind="note") + "".join(found.values())
        parts.append(details(name, body) if parts else f"<h3>{escape(name)}</h3>{body}")
    return "".join(parts)


def _jobs(sweep: Sweep, out: Path) -> str:
    """List the jobs: what was swept, what was found on the run's own held-out text, and a link to the job's own report."""
    body = []
    for job in sweep.jobs:
        ours: Mapping[str, Any] = next((row for row in job.result["rows"] if row.get("name") == "evopress"), {})
        perplexity = next(iter((ours.get("perplexity") or {}).values()), None)
        search = job.result.get("search") or {}
        cells = [
            escape(describe(job.axes)),
            *(show(held_out_kl(ours)[1], significant) or "", show(perplexity, significant) or ""),
            *(show(search.get("tokens"), "{:,.0f}".format) or "", show(search.get("seconds"), duration) or ""),
            _link(job.folder / "report.html", out),
        ]
        body.append((cells, ""))
    headers = ["", "held-out KL", "perplexity", "tokens evaluated", "search", "report"]
    return table(headers, body, text_last=True)


def _link(path: Path, out: Path) -> str:
    """Link to a file relative to the page."""
    if not path.is_file():
        return "none"
    return f'<a href="{escape(Path(os.path.relpath(path.resolve(), out.resolve())).as_posix())}">report</a>'


def _costs(sweep: Sweep, spec: Spec) -> str:
    """Lay out what the searches cost in all, and each variant's on average."""
    of: dict[str, list[Mapping[str, Any]]] = {}
    for job in sweep.jobs:
        variant, search = spec.variant(job.axes, "evopress"), job.result.get("search") or {}
        if variant is not None and search:
            of.setdefault(variant, []).append(search)

    def mean(searches: Sequence[Mapping[str, Any]], key: str) -> float | None:
        values = [value for search in searches if (value := number(search.get(key))) is not None]
        return statistics.fmean(values) if values else None

    keys = (("evaluations", "{:,.0f}".format), ("tokens", "{:,.0f}".format), ("seconds", duration))
    body = [
        ([escape(display_name(variant)), str(len(searches)), *(show(mean(searches, key), how) or "" for key, how in keys)], "")
        for variant, searches in of.items()
    ]
    everything = [search for searches in of.values() for search in searches]
    peaks = [number((job.result.get("memory") or {}).get("peak_rss_bytes")) for job in sweep.jobs]
    totals = {
        "searches": len(everything),
        "tokens evaluated in all": show(sum(number(search.get("tokens")) or 0 for search in everything), "{:,.0f}".format),
        "time of all searches": show(sum(number(search.get("seconds")) or 0 for search in everything), duration),
        "peak memory": show(max((peak for peak in peaks if peak is not None), default=None), in_bytes),
    }
    headers = ["mean of a search", "jobs", "genomes evaluated", "tokens evaluated", "time"]
    return (pairs(totals) + table(headers, body)) if everything else ""


def _environment(jobs: Sequence[Job]) -> str:
    """List versions and machine; what differs between jobs is listed with all its values."""
    names = dict.fromkeys(name for job in jobs for name in job.environment)
    return pairs({name: sorted({str(job.environment[name]) for job in jobs if name in job.environment}) for name in names})


def main() -> None:
    """Write the page of the sweep that is named on the command line."""

    def make(experiment: str, root: Path, out: Path) -> tuple[Sweep, str]:
        sweep, path = make_report(experiment, root=root, out=out)
        return sweep, str(path)

    def make_of_folder(folder: Path, out: Path) -> tuple[Sweep, str]:
        sweep, path = make_report_of(folder, out=out)
        return sweep, str(path)

    of_sweep("Write one HTML page about a sweep, also about a half-finished one.", make, make_of_folder)


if __name__ == "__main__":
    main()
