"""The models and prompts that ship with svdd, and the readers of all other weights and of pictures."""
