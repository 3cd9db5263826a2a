"""Explicit memories: token selection, writing, compression, and the bank that stores them."""
