"""Text from a model that recalls explicit memories while it writes (Memory³ §3.5)."""
