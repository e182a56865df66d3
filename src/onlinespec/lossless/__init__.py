"""Lossless sampling: logits to scores, the noise of a position, verification of drafts. Pure tensor functions."""
