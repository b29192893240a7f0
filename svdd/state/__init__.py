"""A batch of particles at one denoising step, and what all states of a run share."""
