"""Dashboards for Weights & Biases, defined in code: `python -m experiments.dashboards --entity E --project P [--dry-run]`."""
