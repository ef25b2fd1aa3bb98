"""What a user may not read is one line. Root may read everything, so as root a process without that right is asked."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from made_images import write_split
from made_shards import SAMPLE, write_tar

from data.prepare import index_shards

ROOT = Path(__file__).parents[2]
AS_A_USER = [] if os.geteuid() else ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
COMMANDS = """
import sys
from launch import prepare

for argument in sys.argv[1:]:
    print(argument, "->", prepare.main(argument.split(" ")), flush=True)
"""


@pytest.mark.skipif(AS_A_USER != [] and shutil.which("setpriv") is None, reason="root, and no setpriv")
def test_what_may_not_be_read_is_one_line_of_each_command(tmp_path):
    for split in ("train", "val"):
        write_split(tmp_path / "folder" / split, 1)
        write_tar(tmp_path / "shards" / split / "0.tar", SAMPLE)
        (tmp_path / f"{split}.txt").write_text("a.jpg ant\n")
    index_shards(tmp_path / "shards")
    closed = ["folder/train", "shards/train", "shards/train/0.tar", "shards/train/0.idx", "shards/train/manifest.json"]
    copies, commands = [], []
    for number, name in enumerate(closed):
        kind, _, rest = name.partition("/")
        copies.append(shutil.copytree(tmp_path / kind, tmp_path / f"{number}"))
        if rest == "train/0.tar":
            (copies[-1] / "train" / "manifest.json").unlink()
        (copies[-1] / rest).chmod(0)
        commands += [] if rest == "train/0.tar" else [f"shards {copies[-1]} {tmp_path}/packed", f"check {copies[-1]}"]
        commands += [f"index {copies[-1]}"] if kind == "shards" else []
    result = subprocess.run(
        [*AS_A_USER, sys.executable, "-c", COMMANDS, *commands],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.splitlines() == [f"{command} -> 1" for command in commands], result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == len(commands)
    assert all(line.startswith(f"error: {tmp_path}/") and "(Permission denied)" in line for line in lines), lines
