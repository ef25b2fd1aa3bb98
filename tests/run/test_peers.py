"""A rank that dies, stops or fails while the others wait for it: they say why first, and end.

With gloo a wait fails by itself when a process is gone. NCCL's does not; a call that never returns stands for it here.
"""

from pathlib import Path

import pytest
from launching import launch, rank_lines

ENDS = {"killed": "rank {} ended without a word", "failed": "rank {} failed: the disk has gone up in smoke"}


def lines_of(cwd: Path, **env: str) -> list[list[str]]:
    """The lines of the two survivors, when the run of tests/helpers/lost_rank.py has ended."""
    result = launch("tests/helpers/lost_rank.py", [], cwd, ranks=3, timeout=60, **env)
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
        assert len(said) == 1 and "rank 1 has given no sign of life for 2 s (run.silence_s)" in said[0]
