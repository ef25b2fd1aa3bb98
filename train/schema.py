"""Plain data out of files, checked against what this program writes there. Needs no torch."""

from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

LARGEST_INT = 2**64
LARGEST_FLOAT = 1e300
"""Beyond it a sum or a product of a few numbers is infinite."""
DEEPEST = 32
MAX_VALUES = 20_000_000
"""A checkpoint in mid-epoch holds some 600 values a rank for ResNet-50, and some 2,000 for the deepest networks."""


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of this kind: a type, a type hint, a range of whole numbers, or a dictionary of kinds.

    float stands for a finite number, whole or not, int for a whole one that is no bool. Of a dictionary of kinds, keys
    that the value lacks or has beside it are not looked at.
    """
    if kind is Any:
        return True
    if isinstance(kind, dict):
        return isinstance(value, dict) and first_misfit(value, kind) is None
    if isinstance(kind, range):
        return type(value) is int and value in kind
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(fits(entry, inner[0]) for entry in value)
    if kind is float:
        return type(value) in (int, float) and -LARGEST_FLOAT < value < LARGEST_FLOAT  # NaN is not
    if kind is int:
        return type(value) is int and -LARGEST_INT < value < LARGEST_INT
    return isinstance(value, kind)


def first_misfit(values: dict[str, Any], kinds: dict[str, Any]) -> str | None:
    """The first key whose value is not of its kind; None where all are."""
    return next((key for key, kind in kinds.items() if key in values and not fits(values[key], kind)), None)


def is_plain(value: Any, leaves: tuple[type, ...]) -> bool:
    """Whether it is made of lists, dictionaries, numbers, words and `leaves`, within `DEEPEST` and `MAX_VALUES`.

    Without recursion, and what is held in several places counts in each: few bytes can describe very much.
    """
    left, open_values = MAX_VALUES, [(value, 0)]
    while open_values:
        value, depth = open_values.pop()
        left -= 1
        if left < 0 or depth > DEEPEST:
            return False
        if isinstance(value, dict):
            inside = [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            inside = value
        elif isinstance(value, int):
            if not -LARGEST_INT < value < LARGEST_INT:
                return False
            continue
        elif value is None or isinstance(value, (float, str, bytes, *leaves)):
            continue
        else:
            return False
        if len(inside) > left:
            return False
        open_values += [(entry, depth + 1) for entry in inside]
    return True
