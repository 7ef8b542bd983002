"""Helpers that know nothing of cross-entropy: files written whole or not at all, text, tables."""
