"""The error of this room."""


class RetrievalError(ValueError):
    """An embedder, an index or a search that cannot work. The message names the remedy."""
