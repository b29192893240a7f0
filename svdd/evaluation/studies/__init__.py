"""Studies: many runs that one file describes, their tables and their plots."""
