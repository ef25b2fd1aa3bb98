"""A rank that dies, stops or fails while the others wait for it: they say why first, and end.

With gloo a wait fails by itself when a process is gone. NCCL's does not; a call that never returns stands for it here.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, launch, rank_lines

from train.cli import LEFT_WAITING

ENDS = {"killed": "rank {} ended without a word", "failed": "rank {} failed: the disk has gone up in smoke"}


def lines_of(cwd: Path, **env: str) -> list[list[str]]:
    """The lines of the two survivors, when the run of tests/helpers/lost_rank.py has ended."""
    result = launch("tests/helpers/lost_rank.py", [], cwd, ranks=3, **env)
    assert result.returncode != 0
    said = rank_lines(result.stderr)
    return [
        [line for line in said if line.startswith(f"[rank {rank}]")] for rank in range(3) if str(rank) != env["VICTIM"]
    ]


@pytest.mark.parametrize("victim", ["0", "1"])
@pytest.mark.parametrize("wait", ["kernel", "all_reduce"])
@pytest.mark.parametrize("fault", ["killed", "failed"])
def test_who_waits_for_a_dead_rank_names_it_first_and_ends(tmp_path: Path, fault: str, wait: str, victim: str):
    """The store goes with rank 0, as it does without torchrun."""
    for said in lines_of(tmp_path, FAULT=fault, WAIT=wait, VICTIM=victim):
        assert len(said) == 1 and ENDS[fault].format(victim) in said[0]


def test_a_rank_that_is_stopped_inside_an_all_reduce_is_given_up(tmp_path: Path):
    """Its process is there, and its connections are: only its signs of life are missing."""
    for said in lines_of(tmp_path, FAULT="stopped", WAIT="all_reduce", VICTIM="1"):
        assert len(said) == 1 and "rank 1 has given no sign of life for 4 s (run.silence_s)" in said[0]


ENDS_BEFORE_ITS_STORE_ANSWERS = """
import sys, time
from datetime import timedelta
import torch.distributed as dist
from train import cli, world

class Silent:
    def clone(self):
        return self

    def compare_set(self, *arguments):
        dist.HashStore().wait(["never"], timedelta(seconds=2))  # in C++, which wants Python back in the end

class Last:
    def __del__(self, sleep=time.sleep):  # the interpreter's end takes its time
        sleep(4)

def main(argv):
    world.leave_word("the disk has gone up in smoke")
    print(argv, "is told")
    if argv == ["a bug"]:
        raise AssertionError("a bug on this rank")
    return 1

last, dist.is_initialized, dist.distributed_c10d._get_default_store = Last(), lambda: True, Silent
world.STORE_ANSWERS_WITHIN_S = 0.1
cli.end_with(main)
"""


@pytest.mark.parametrize("word", ["an error", "a bug"])
def test_an_answer_of_the_store_that_comes_while_python_ends_does_not_abort_the_process(word: str):
    command = [sys.executable, "-c", ENDS_BEFORE_ITS_STORE_ANSWERS, word]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert result.returncode == 1 and result.stdout == f"['{word}'] is told\n"
    assert ("AssertionError: a bug on this rank" in result.stderr) == (word == "a bug")
    assert "terminate" not in result.stderr


def test_the_threads_that_may_be_left_waiting_are_known_by_their_names():
    sources = "".join(path.read_text() for room in ("data", "train") for path in (ROOT / room).rglob("*.py"))
    assert [name for name in LEFT_WAITING if f'name="{name}"' not in sources] == []
