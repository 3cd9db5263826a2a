"""Benchmarks: ratios of times to those of peers and controls, measured in alternation."""
