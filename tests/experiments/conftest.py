"""Experiments import each other as plain modules, with their folder on sys.path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "analysis" / "experiments"))
