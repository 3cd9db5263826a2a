"""Lists of variants of a config: planned, trained, measured and shown side by side."""
