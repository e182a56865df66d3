"""A small language model as a drafter."""
