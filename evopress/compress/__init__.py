"""Tensors in, tensors out: one module per compressor. Knows no model, file, hook or config.

Shape letters: R rows (outputs), C columns (inputs), G groups of columns that share a scale, n calibration sequences.
"""
