"""Chats and preference pairs: reading, template, packed corpus."""
