"""Checkpoints that earlier versions wrote, brought to today's format.

Format 2 was written at the ends of epochs only, format 3 in the middle of them, too. Format 4 names the pruning method
and holds its state. Format 5 holds the run's id and log, and the names of the classes. Format 6 holds the images that
the weights want, and the device whose seconds the run plans with; format 7 the side of validation images, too.
"""

from typing import Any, get_args

from data.batch import NORMALISATION
from train.log.ledger import Kind

FORMAT = 7
WITHOUT_CHECKSUM = (2,)
"""Formats that had none yet."""


def upgrade(content: dict[str, Any]) -> dict[str, Any]:
    """The content in today's format.

    Raises ValueError for an unknown format, KeyError or TypeError for content that is not as its format says.
    """
    steps = {2: _from_2, 3: _from_3, 4: _from_4, 5: _from_5, 6: _from_6}
    while (found := content["format"]) != FORMAT:
        if found not in steps:
            raise ValueError(f"found format {found!r}, allowed: {', '.join(map(str, steps))} and {FORMAT}")
        content = steps[found](content) | {"format": found + 1}
    return content


def _from_2(content: dict[str, Any]) -> dict[str, Any]:
    if "ranks" not in content:  # a network alone
        return content
    none_yet = dict.fromkeys(get_args(Kind), 0.0)
    ranks = []
    for rank in content["ranks"]:
        ledger = rank["ledger"]
        seconds = {"seconds": none_yet | ledger["seconds"], "reported": none_yet | ledger["reported"]}
        ranks.append(rank | {"ledger": ledger | seconds, "so_far": None, "buffers": None})
    return content | {
        "progress": content["progress"] | {"wrapped_at": 0, "compiled": False},
        "ranks": ranks,
        "batch_size": content["config"]["data"]["batch_size"],
        "allowed_widths": None,
    }


def _from_3(content: dict[str, Any]) -> dict[str, Any]:
    if "ranks" not in content:
        return content
    ranks = []
    for rank in content["ranks"]:
        so_far = rank["so_far"]
        if so_far is not None:
            so_far = {key: value for key, value in so_far.items() if key != "is_averaged"}
            so_far["is_trained"] = rank["so_far"]["is_averaged"]
        ranks.append(rank | {"so_far": so_far})
    method = "hard_ramp" if content["config"]["cup"]["enabled"] else "none"
    return content | {"ranks": ranks, "method": {"name": method, "state": {}}}


def _from_4(content: dict[str, Any]) -> dict[str, Any]:
    content = content | {"classes": None}
    return content if "ranks" not in content else content | {"run_id": None, "log": None}


def _from_5(content: dict[str, Any]) -> dict[str, Any]:
    if "ranks" in content:
        content = content | {"step_device": None}
    if content["config"] is None:  # weights from elsewhere, and nothing was said of their images
        return content | {"preprocessing": None}
    data = content["config"]["data"]
    mean, std = NORMALISATION[data["channels"]]
    sizes = {name: data[name] for name in ("image_size", "resize_size")}
    rest = {"resized_side": "shorter", "interpolation": "bilinear", "mean": list(mean), "std": list(std)}
    return content | {"preprocessing": sizes | rest}


def _from_6(content: dict[str, Any]) -> dict[str, Any]:
    own = content["preprocessing"]
    return content if own is None else content | {"preprocessing": own | {"val_size": None}}
