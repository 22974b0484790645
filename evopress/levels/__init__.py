"""The level database: built by one walk over the blocks, stored compactly, applied to a live model."""
