"""Retrieval: embedders, the index of a knowledge base, and the overlap-filtered search."""
