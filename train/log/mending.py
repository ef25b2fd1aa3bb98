"""Where a log goes on after a checkpoint, when the file is not what it was when the checkpoint was written."""

import json
from typing import Any


def lines_of_checkpoint(found: bytes, stored: dict[str, Any], log_name: str) -> tuple[bytes, str | None]:
    """The whole lines after which a resumed run goes on, and a note where the file lacks some of them.

    found: what the file holds. stored: the checkpoint; those of today's format hold the log's lines, older ones only
    their length and the line of the last epoch.
    """
    if stored["log"] is not None:
        lines = stored["log"].encode()
        return lines, None if found.startswith(lines) else f"{_state(found, lines, log_name)}: written again whole"
    lines = found[: stored["log_bytes"]]
    if len(lines) == stored["log_bytes"] and lines[-1:] in (b"", b"\n"):
        return lines, None
    lines = lines[: lines.rfind(b"\n") + 1]
    last_line, last = stored["progress"].get("last_line"), stored["progress"].get("epoch", 0)
    there = {event["epoch"] for event in map(json.loads, lines.splitlines()) if event.get("event") == "epoch"}
    if last_line and last not in there:
        lines += json.dumps(last_line).encode() + b"\n"
        there.add(last)
    missing = sorted(set(range(1, last + 1)) - there)
    return lines, (
        f"{log_name}: found {len(found):,} of the {stored['log_bytes']:,} bytes that the checkpoint says, cut at the "
        f"last whole line and epoch {last} written again; the checkpoint, of an earlier version, holds no other line, "
        f"so epochs {', '.join(map(str, missing)) or 'none'} are missing from the log"
    )


def _state(found: bytes, lines: bytes, log_name: str) -> str:
    wanted = f"the {len(lines):,} bytes that the checkpoint holds of it"
    if not found:
        return f"{log_name}: found nothing of {wanted}"
    if lines.startswith(found):
        return f"{log_name}: found {len(found):,} of {wanted}"
    return f"{log_name}: found {len(found):,} bytes that are not {wanted}, now {log_name}.damaged"
