"""`small_lm`: a small language model as the drafter."""
