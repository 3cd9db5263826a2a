"""The transformer: attention over prefix, memories and context; generation; model folders."""
