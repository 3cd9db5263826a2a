"""Ahead-of-time compilation for slices that are not attached; counted FLOPs and bytes."""
