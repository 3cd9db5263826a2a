"""Text from a model that reads explicit memories while it writes (Memory³ §3.5)."""
