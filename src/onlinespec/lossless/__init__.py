"""Lossless sampling: scores from logits, the Gumbel noise of a position, verification of drafts. Tensor code only."""
