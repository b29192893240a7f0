"""Pretrained models as Markov chains: one file per model family."""
