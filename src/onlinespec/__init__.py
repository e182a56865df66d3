"""Lossless speculative decoding whose drafter learns online."""

__version__ = "0.1.0"
