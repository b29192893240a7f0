"""The models and prompts that ship with svdd, and the loader of all other weights."""
