"""Fixtures of the data tests."""

from made_images import photos  # noqa: F401
