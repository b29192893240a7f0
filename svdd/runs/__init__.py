"""Prompts in, images and result rows out, and resumption from what is on disk."""
