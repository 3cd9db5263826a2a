"""Retrieval of references: embedders, vector index, and search with the overlap filter."""
