"""Cleaning of documents in blocks: repair, rules, near-duplicates, quality, report."""
