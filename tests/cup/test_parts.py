"""Parts of the channels: halves, slices, shuffles, pixels out of channels. Twins in float64."""

import pytest
import torch
import torch.nn.functional as F
from cup_twins import check_against_twin, randomise
from torch import nn

import cup


class Network(nn.Module):
    """A function between a convolution of 16 channels and one that reads what comes out, whatever its width."""

    def __init__(self, middle, width):
        super().__init__()
        self.a, self.c = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.eight, self.four = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.glu, self.shuffle = nn.BatchNorm2d(16), nn.GLU(1), nn.ChannelShuffle(4)
        self.up, self.down = nn.PixelShuffle(2), nn.PixelUnshuffle(2)
        self.b, self.fc = nn.Conv2d(width, 6, 3, padding=1), nn.Linear(6, 5)
        self.middle = middle

    def forward(self, x):
        y = self.middle(self, F.gelu(self.norm(self.a(x))))
        return self.fc(self.b(y).mean((2, 3)))


def network(middle):
    width = middle(Network(middle, 1).eval(), torch.zeros(1, 16, 8, 8)).shape[1]
    torch.manual_seed(0)
    return randomise(Network(middle, width)), torch.randn(3, 3, 8, 8)


def shuffled(y, rows):
    batch, channels, height, width = y.shape
    y = y.view(batch, rows, channels // rows, height, width).transpose(1, 2).contiguous()
    return y.view(batch, channels, height, width)


def c2f(s, y):
    """As in YOLOv8: the second half goes through blocks, and all that came out on the way is joined."""
    parts = list(y.chunk(2, 1))
    parts.extend(part + s.eight(part) for part in parts[-1:])
    return torch.cat(parts, 1)


def shuffle_unit(s, y):
    one, other = y.chunk(2, dim=1)
    return shuffled(torch.cat((one, s.eight(other)), dim=1), 2)


def ghost(s, y):
    """Of channels and cheap ones beside them as many as are asked for; that is all of them."""
    y = s.c(y)
    return torch.cat([y, y.tanh()], 1)[:, :32, :, :]


FREE = {
    "chunk": (lambda s, y: y.chunk(4, 1)[2], 4),
    "torch.chunk from the end": (lambda s, y: torch.chunk(y, 2, -3)[-1], 8),
    "halves swapped": (lambda s, y: torch.cat([y.chunk(2, 1)[1], y.chunk(2, 1)[0]], 1), 8),
    "split by its own width": (lambda s, y: s.eight(y.split(y.shape[1] // 2, dim=1)[1]), 8),
    "split over pixels": (lambda s, y: torch.cat((y.split([3, 5], 2)[0], y[:, :, 3:]), 2), 16),
    "rows in two": (lambda s, y: y.chunk(2, 2)[0] * y.chunk(2, 2)[1], 16),
    "a gate of halves": (lambda s, y: F.glu(y, 1), 8),
    "a gate of halves by hand": (lambda s, y: (lambda g, v: g.sigmoid() * v)(*y.chunk(2, 1)), 8),
    "a gate module": (lambda s, y: s.glu(y), 8),
    "a gate over pixels": (lambda s, y: F.glu(y, 3), 16),
    "first half by its own width": (lambda s, y: s.eight(y[:, : y.size(1) // 2]), 8),
    "last quarters by its own width": (lambda s, y: y[:, y.shape[1] // 4 :], 4),
    "a shuffle": (lambda s, y: shuffled(y, 4), 4),
    "a shuffle of two": (lambda s, y: s.c(shuffled(y, 2)), 8),
    "a shuffle module": (lambda s, y: s.shuffle(y), 4),
    "a shuffle function": (lambda s, y: F.channel_shuffle(y, 2), 8),
    "rows of four": (lambda s, y: y.view(y.shape[0], -1, 4, 8, 8).flatten(1, 2), 4),
    "pixels out of channels": (lambda s, y: s.up(y), 4),
    "pixels out of channels by a function": (lambda s, y: F.pixel_shuffle(s.c(y), 2), 16),
    "channels out of pixels": (lambda s, y: s.down(y), 16),
    "flipped": (lambda s, y: y.flip(1), 16),
    "flipped over pixels": (lambda s, y: torch.flip(y, dims=(2, 3)) * y, 16),
    "C2f": (c2f, 8),
    "all of them as a slice": (ghost, 16),
    "from minus its width": (lambda s, y: y[:, -16:], 16),
}
"""Case -> what stands in the middle, and the width of the group of `a`; None where it need not be free."""


@pytest.mark.parametrize("case", list(FREE))
def test_parts_of_the_channels_are_followed(case):
    middle, width = FREE[case]
    model, images = network(middle)
    for seed in range(3):
        groups = check_against_twin(model, images, seed)
        (group,) = [group for group in groups if group.name == "a"]
        assert width is None or (group.frozen, group.width) == ("", width)


FIXED = {
    "split to a fixed size": lambda s, y: y.split(8, dim=1)[1],
    "split to fixed sizes": lambda s, y: torch.split(y, [4, 12], 1)[1],
    "chunks that are not alike": lambda s, y: y.chunk(3, 1)[2],
    "fewer chunks than asked for": lambda s, y: y.chunk(7, 1)[1],
    "all chunks joined": lambda s, y: torch.stack(y.chunk(2, 1), 1).sum(1),
    "a split by another width": lambda s, y: y.split(s.eight(y[:, :8]).shape[1], dim=1)[0],
    "a range": lambda s, y: y[:, 3:7],
    "the first": lambda s, y: y[:, :5],
    "all but the last": lambda s, y: y[:, :-2],
    "the last": lambda s, y: y[:, -3:],
    "without the first": lambda s, y: y[:, 2:],
    "without the first and the last": lambda s, y: y[:, 2:-2],
    "every second": lambda s, y: y[:, ::2],
    "a share of the pixels' number": lambda s, y: y[:, : y.shape[2] // 2],
    "a shuffle of a fixed size": lambda s, y: y.view(-1, 2, 8, 8, 8).transpose(1, 2).reshape(-1, 16, 8, 8),
    "a shuffle unit": shuffle_unit,
    "by a share of its width": lambda s, y: y / (y.shape[1] // 2),
    "a share and a number of it": lambda s, y: y[:, : y.shape[1] // 2] * (y.shape[1] // 2),
    "pixels out of fixed channels": lambda s, y: F.pixel_shuffle(y.view(-1, 4, 4, 8, 8).flatten(1, 2), 2),
}


@pytest.mark.parametrize("case", list(FIXED))
def test_what_counts_on_the_width_is_not_cut_wrongly(case):
    model, images = network(FIXED[case])
    for seed in range(2):
        check_against_twin(model, images, seed)


def test_a_slice_keeps_the_channels_that_it_counts_and_frees_those_behind():
    """Dual-path networks: of a concatenation the first so many are the residual, the rest is grown."""

    class Dual(Network):
        def forward(self, x):
            y = torch.cat([self.a(x), self.c(self.a(x))], 1)
            return self.fc(self.b(torch.cat([y[:, :16], y[:, 16:]], 1)).mean((2, 3)))

    model = randomise(Dual(None, 32))
    groups = check_against_twin(model, torch.randn(3, 3, 8, 8))
    frozen = {group.name: group.frozen for group in groups}
    assert frozen["a"] == "getitem counts on its width"
    assert frozen["c"] == ""


def test_channels_with_unequal_shares_of_a_layer_stay():
    model, images = network(lambda s, y: shuffled(torch.cat([s.eight(shuffled(y, 2).chunk(2, 1)[0]), y], 1), 3))
    check_against_twin(model, images)
    for criterion in ("cup", "gm", "l1", "cop", "max_abs"):
        groups = cup.channel_groups(model, images)
        if cup.prunable_groups(groups, "all"):
            cup.plan_by_threshold(model, groups, 1.0, cup.PlanOptions(criterion=criterion, scope="all"))
