"""The input pipeline: rows, chunks, retrieved references, memories."""
