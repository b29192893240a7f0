"""Measurements of finished images: diversity, distances, comparison with an unguided run."""
