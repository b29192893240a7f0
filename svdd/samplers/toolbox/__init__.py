"""What several samplers share: selection, resampling, weights, temperature, candidates per step."""
