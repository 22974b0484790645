"""Table 1: removing strictly more modules can improve perplexity."""
