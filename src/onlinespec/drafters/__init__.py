"""Drafters: one file or folder per family, and their shared code for drafting, learning, loading and saving."""
