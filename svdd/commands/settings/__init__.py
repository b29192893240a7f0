"""The settings of the commands, read without importing torch: help, short forms, completion, suggestions."""
