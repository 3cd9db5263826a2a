"""Filters of references: rules, contamination, near-duplicates, report."""
