"""Drafters: one file per family, and what they share for drafting, learning and saving."""
