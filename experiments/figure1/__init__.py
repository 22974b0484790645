"""Figure 1: searches over pairs of blocks against the optimum."""
