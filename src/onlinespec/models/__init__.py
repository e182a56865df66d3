"""Targets: loading them, and our own fast forward."""
