"""Benchmarks: ratios of times, measured in pairs against peers and controls."""
