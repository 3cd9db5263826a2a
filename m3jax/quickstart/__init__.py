"""Invented people: their data, the demonstration, and the proof that facts live in the bank."""
