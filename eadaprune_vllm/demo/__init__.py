"""The embedded model and the demonstration that serves it."""

from pathlib import Path

MODEL = Path(__file__).parent / "trained"
