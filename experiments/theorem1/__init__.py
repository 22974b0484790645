"""Theorem 1: generations to the optimum of a linear fitness."""
