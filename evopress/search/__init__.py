"""Search strategies: genomes, a budget, a random generator and whoever answers their questions, no tensors."""
