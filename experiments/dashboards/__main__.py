"""Create the dashboards in Weights & Biases, or print what would be created.

    python -m experiments.dashboards --entity E --project P [--dry-run]

saves the report and the workspace of `experiments/dashboards/panels.py` to a project. Without an API key, and with --dry-run,
nothing is sent: both are built and validated; --dry-run prints their specification as JSON.
"""

from __future__ import annotations

import argparse
import json

from evopress.errors import EvoPressError, first_line
from evopress.reporting.tracker import has_key, project_by_default
from experiments.dashboards.build import build_report, build_workspace, specification
from experiments.scripts import in_one_sentence


@in_one_sentence()
def main() -> None:
    """Create the dashboards that the command line asks for."""
    parser = argparse.ArgumentParser(description="Create the W&B report and workspace of a project.")
    parser.add_argument("--entity", required=True, help="user or team that the project belongs to")
    parser.add_argument(
        "--project", help="that runs were tracked in (default: what wandb is set to, by WANDB_PROJECT, else evopress)"
    )
    parser.add_argument("--only", choices=("report", "workspace"), help="create one of the two")
    parser.add_argument("--dry-run", action="store_true", help="print the specification as JSON and create nothing")
    arguments = parser.parse_args()
    create(arguments.entity, arguments.project or project_by_default(), only=arguments.only, dry_run=arguments.dry_run)


def create(entity: str, project: str, *, only: str | None = None, dry_run: bool = False) -> None:
    """Build and validate the dashboards, and save them where there is a key and `dry_run` does not forbid it.

    Raises: EvoPressError if wandb-workspaces is missing, or the service refuses.
    """
    builders = {"report": build_report, "workspace": build_workspace}
    dashboards = {name: build(entity, project) for name, build in builders.items() if only in (None, name)}
    specifications = {name: specification(dashboard) for name, dashboard in dashboards.items()}
    if dry_run:
        print(json.dumps(specifications, indent=2, ensure_ascii=False))
        return
    if not has_key():
        print(f"valid: {' and '.join(dashboards)}; nothing was created, as there is no Weights & Biases API key: run `wandb login`")
        return
    for name, dashboard in dashboards.items():
        try:
            dashboard.save()
        except Exception as error:  # whatever the service or the network says
            raise EvoPressError(
                f"the {name} could not be saved to {entity}/{project} ({first_line(error)}): check the entity, the project and "
                "the network"
            ) from error
        print(f"{name}: {dashboard.url}")


if __name__ == "__main__":
    main()
