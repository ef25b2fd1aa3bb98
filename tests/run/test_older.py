"""Runs that earlier versions began go on.

`older/` holds what they left, format 2 at an epoch's end and format 3 within one, made by commits 547e95e and 8da86a3
with torch 2.14.1, from the settings below under their names of then, and ended by an exception before training step 27
and 20.
"""

import shutil
from pathlib import Path

import pytest
from launching import events, numbers, train

from train.checkpoint.file import load_checkpoint
from train.checkpoint.upgrade import FORMAT

OLDER = Path(__file__).parent / "older"
SETTINGS = {
    "data__synthetic_images": 256,
    "train__epochs": 4,
    "prune__last_epoch": 2,
    "prune__target_reduction": 40,
    "run__device": "cpu",
}
UNDISTURBED = {3: (1.985342264175415, 34.375), 4: (1.5885546207427979, 43.75)}
"""Epoch -> loss and top-1 of runs of those commits that nothing ended."""


@pytest.mark.parametrize(("version", "start"), [("format2", (4, 0)), ("format3", (3, 3))])
def test_a_run_of_an_earlier_version_goes_on(tmp_path: Path, version: str, start: tuple[int, int]):
    shutil.copytree(OLDER / version, tmp_path / "tiny")
    log = train(tmp_path, **SETTINGS)
    began, goes_on = events(log, "run")
    assert (began["first_epoch"], goes_on["first_epoch"], goes_on["first_step"]) == (1, *start)
    found = {epoch: (loss, top1) for epoch, loss, top1, *_ in numbers(log)}
    assert sorted(found) == [1, 2, 3, 4]
    for epoch, (loss, top1) in UNDISTURBED.items():  # other machines round differently
        assert found[epoch] == (pytest.approx(loss, rel=1e-3), pytest.approx(top1, abs=2))
    assert {event["flops"] for event in events(log, "epoch")[1:]} == {113926}
    stored = load_checkpoint(tmp_path / "tiny/last.pt")
    assert stored["format"] == FORMAT and stored["method"] == {"name": "hard_ramp", "state": {}}
