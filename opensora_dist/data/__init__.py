"""Prepared data sets: what is in them, in which order they are seen, and how their bytes become batches."""
