"""Comparisons of learners on a stream of prompts, and the reports they write."""
