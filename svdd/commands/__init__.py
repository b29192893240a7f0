"""The commands that need a model: one file each."""
