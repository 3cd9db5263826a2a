"""Generation of text with a model that reads explicit memories (Memory³ §3.5)."""
