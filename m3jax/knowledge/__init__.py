"""Versioned knowledge of a workdir (references, index, bank): editing and maintenance."""
