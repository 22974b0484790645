"""Figure 7: scores of blocks against the perplexity without random ones."""
