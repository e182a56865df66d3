"""The small pair that ships with the package: where its files lie. How they were made: recipe.py."""

from pathlib import Path

TARGET = Path(__file__).parent / "target"
DRAFTER = Path(__file__).parent / "drafter"
