"""Tools for developers of svdd; none of it is part of the package."""
