"""The small models that ship with the package: where their files lie, by name. How they were made: recipe.py."""

from pathlib import Path

TARGET = Path(__file__).parent / "target"
DRAFTER = Path(__file__).parent / "drafter"
SMALL_LM = Path(__file__).parent / "small_lm"

TARGETS = {"demo": TARGET}
DRAFTERS = {"demo": DRAFTER, "demo/small_lm": SMALL_LM}
