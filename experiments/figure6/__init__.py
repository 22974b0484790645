"""Figure 6: which modules the searches drop."""
