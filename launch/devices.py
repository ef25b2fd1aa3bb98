"""The argument --device of the scripts that model seconds."""

from argparse import ArgumentTypeError
from collections.abc import Callable

import cup

KNOWN = f"{', '.join(cup.DEVICES)}, or a .json file of bench.py cost --out"


def device_name(*here: str) -> Callable[[str], str]:
    """The `type` of --device: what train/network/calibration.py's `known_device` takes, and the names `here`."""

    def name(text: str) -> str:
        if text in (*here, *cup.DEVICES) or text.endswith(".json"):
            return text
        raise ArgumentTypeError(f"found {text}, allowed: {', '.join((*here, KNOWN))}")

    return name
