"""The stages of a run, each a function of the workspace and of what earlier stages left in the run folder."""
