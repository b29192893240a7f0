"""The page of `svdd app`: its controls from the registry, its one job at a time, and its server."""
