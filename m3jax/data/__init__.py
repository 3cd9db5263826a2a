"""The input pipeline: rows, their chunks, retrieved references and memories."""
