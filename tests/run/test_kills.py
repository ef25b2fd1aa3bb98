"""The short versions of kills.py and soak.py in tests/experiments/, and the two hosts where they can be made."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from launching import ROOT, launch


def test_killed_runs_end_by_themselves_with_the_bits_of_undisturbed_ones(tmp_path: Path):
    arguments = ["--kills", "2", "--seed", "5", "--ranks", "2", "--out", "kills.json"]
    result = launch("tests/experiments/kills.py", arguments, tmp_path, timeout=580)
    assert result.returncode == 0, result.stdout + result.stderr
    runs = json.loads((tmp_path / "kills.json").read_text())["runs"]
    assert sum(len(run["kills"]) for run in runs) == 2
    assert all(run["bit_equal"] and run["log_equal"] for run in runs)


def test_resizes_leave_no_memory_file_or_thread_behind(tmp_path: Path):
    result = launch("tests/experiments/soak.py", ["--resizes", "20", "--every", "5", "--out", "soak.json"], tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    for rows in json.loads((tmp_path / "soak.json").read_text())["ranks"]:
        assert [row["resizes"] for row in rows] == [0, 5, 10, 15, 20]


@pytest.mark.skipif("TWO_HOSTS" not in os.environ, reason="takes minutes and root: TWO_HOSTS=1 pytest asks for it")
@pytest.mark.timeout(900)
def test_a_host_that_is_cut_off_and_comes_back_changes_no_bit(tmp_path: Path):
    result = subprocess.run(
        ["bash", str(ROOT / "tests/experiments/two_hosts.sh"), str(tmp_path)], capture_output=True, text=True
    )
    if result.returncode == 77:
        pytest.skip(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
