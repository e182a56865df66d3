"""How the shipped pair and the built-in prompts were made: generators of text, training, and what is frozen of them.

Not part of the package. Run from a checkout: `PYTHONPATH=tools python -m demo_pair.recipe --help`.
"""
