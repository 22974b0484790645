"""What exported files are worth in their engines: llama.cpp's own mixes at equal size, the price of each engine's rules."""
