"""Data sets made or fetched as image folders, one file for each. A folder is there whole or not at all."""

from data.prepare.digits import prepare_digits
from data.prepare.dispatch import prepare_data

__all__ = ["prepare_data", "prepare_digits"]
