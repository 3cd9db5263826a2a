"""Adapter for lm-evaluation-harness and its task files."""
