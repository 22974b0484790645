"""Figure 5: how the searches of depth pruning converge."""
