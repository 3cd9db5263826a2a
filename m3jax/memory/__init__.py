"""Explicit memories: choosing tokens, writing, the bank."""
