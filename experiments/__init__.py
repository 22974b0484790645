"""Experiments: one folder per table, figure or claim of the paper."""
