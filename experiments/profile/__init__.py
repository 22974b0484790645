"""Figures 8, 9, 11 and 12: where the budget goes, by projection and by block."""
