"""How much to draft: expected tokens over expected time. Pure arithmetic, no torch."""
