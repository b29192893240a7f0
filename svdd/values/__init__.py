"""Estimates of the soft value of a noisy state: one file per estimator."""
