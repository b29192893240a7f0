"""What several samplers share: selection, resampling, weights, tempering, guidance windows, candidates per step."""
