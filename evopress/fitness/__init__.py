"""A population of genomes goes in, a number for each comes out. Lower is better."""
