"""The live line's speed and estimate, from a clock of our own."""

import itertools

from train.loop.pace import Moment, Pace


def test_speed_and_end_follow_from_the_steps_of_this_process():
    """10 steps of 0.5 s since a resume at step 20; left: 70 steps, 2 epochs of 100 steps, 3 evaluations of 4 s."""
    clock = itertools.chain([100.0], itertools.repeat(105.0))
    pace = Pace(epochs=5, steps=100, batch_size=64, first_step=20, eval_s=4.0, clock=lambda: next(clock))
    text = pace.text(Moment(epoch=3, step=30, reduction=1.5, image_size=160, loss=2.34567))
    assert text == "epoch 3/5  loss 2.346  FR 1.50  128 images/s  160 px  run ends in 0:02:27"
