"""Base models: the catalog, where they are fetched from, and their weights on disk."""
