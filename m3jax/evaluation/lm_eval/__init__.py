"""Adapter for lm-evaluation-harness."""
