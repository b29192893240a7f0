"""Ways to drive particles down the chain: one file per algorithm."""
