"""The transformer: attention over prefix, memories and context; no disks, no stages."""
