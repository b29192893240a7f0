"""The documentation site: hooks of mkdocs, and the pages generated when it is built."""
