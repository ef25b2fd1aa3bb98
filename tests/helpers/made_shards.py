"""Tar files as others write them for WebDataset."""

import io
import tarfile
from pathlib import Path

SAMPLE = [("a.jpg", b"pixels"), ("a.cls", b"0")]


def write_tar(file: Path, members: list[tuple[str, bytes]]) -> None:
    """members: (name, content); a name may come twice."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
