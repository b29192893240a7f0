"""Builds the small Stable Diffusion model, and its two CLIPs, that ship inside the package."""
