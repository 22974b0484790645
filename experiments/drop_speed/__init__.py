"""How fast genomes with dropped modules are evaluated."""
