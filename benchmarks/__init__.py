"""Measurements, as ratios taken in one run; none of them is a test."""
