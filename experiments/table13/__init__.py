"""Table 13: in which order the scores remove blocks."""
