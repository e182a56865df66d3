"""The `small_lm` drafter: a small language model."""
