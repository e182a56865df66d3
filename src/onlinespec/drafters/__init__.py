"""Drafters: one file or folder per family, and the shared code for drafting, learning, loading and saving."""
