"""The commands: one file each, their parser, and the registry of classes."""
