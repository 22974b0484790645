"""Time, memory and the machine's limit: the fast paths beside the plain ones."""
