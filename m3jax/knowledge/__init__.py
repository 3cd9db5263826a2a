"""Versions of references, index and bank that belong together; their edits and upkeep."""
