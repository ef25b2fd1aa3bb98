"""Names of classes: numbers are sorted as numbers."""

import numpy as np

MAX_DIGITS = 18
"""Of a number; more do not fit into int64."""


def is_number(class_name: str) -> bool:
    """Whether a class is called by a number, which sorts as such."""
    return class_name.isdecimal() and len(class_name) <= MAX_DIGITS


def numbered_classes(found: list[str]) -> tuple[list[str], np.ndarray]:
    """The classes in sorted order, those that are all numbers by number, and the label int64 (N,) of each image."""
    numeric = all(map(is_number, found))
    classes = sorted(set(found), key=lambda name: (int(name) if numeric else 0, name))  # 1 and 01 are two classes
    label_of = {class_name: label for label, class_name in enumerate(classes)}
    return classes, np.array([label_of[class_name] for class_name in found], dtype=np.int64)
