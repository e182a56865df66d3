"""The life of a request: prefill, steps, scheduling, text."""
