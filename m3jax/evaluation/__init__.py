"""Losses, questions, reports and pictures."""
