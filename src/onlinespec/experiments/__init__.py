"""Comparisons of learners over a stream, and what they leave on disk."""
