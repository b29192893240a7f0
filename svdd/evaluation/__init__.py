"""Measurements of finished images: statistics, diversity, distances, and comparison with an unguided run."""
