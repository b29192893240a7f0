"""What several samplers share: selection, resampling, weights, tempering, candidates per step."""
