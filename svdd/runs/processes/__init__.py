"""The processes of a run: how they are launched, and how a run stops."""
