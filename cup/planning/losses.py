"""What narrower widths lose, in one unit for all groups: relative error, once for each layer that writes or reads.

A ranking's heights are of the size of weights, and a group that many layers write and read has larger ones than a
group between two layers: Ward's distance grows with the root of the number of connections. Taken as they are, they
never cut a residual stream. Here they count relative to the group's own:

    energy of a channel that goes: e = height squared; of the last one, which always stays: that of the last to go
    noise to signal at width w:    r(w) = sum of e over those that have gone / sum of e over those that stay
    loss of the group at width w:  L(w) = layers x (1 + r(w)) x full width / width now

For CUP the squares of Ward's heights are twice what the merges add to the squared distances within clusters, so r is
the part of the filters' variance that their clusters do not explain, over the part that they do. Features are sums
over connections, so a layer more that reads the group raises all of e alike, and r stays: it is judged per connection.

Why times layers: in a residual network of K blocks an inner group with a relative error r disturbs one block's
contribution, the result so by r / K; a stream with that error, which all blocks read, disturbs it by r. The stream has
about K times as many layers. What is compared in the end is loss for a second saved, and the seconds of a stream are
those of all its layers, too: so a stream of twenty layers is judged like an inner group of two.

Why over what stays: errors of groups in a row add up as noise over signal, and it makes the last channels dear.
Filters that are all equally far from each other lose full width / w - 1, which the planner balances to widths that go
with the root of the time of a layer; with a loss that grows in equal steps it would take one group down to a single
channel before it touches the next. What earlier cuts have taken counts as channels of average energy: hence the full
width over the one now.

A residual block that is dropped loses all that is left of its branch. Its price is that of the next channel, for all of
them: one channel more of energy e raises L by L e / (what stays), so what stays as a whole costs L(w) once more.

    loss of a dropped block:       branches x the largest L(w) of the groups in them, at their widths now
                                   x writers^2 / (writers now x (writers now - 1))

The largest and not the sum: the same signal passes these groups in a row, and is gone when one of them is empty. It
agrees with the stream's view: of K equal blocks one that goes takes 1/K of the stream's energy from the 2K layers that
read or write it, a loss of 2K / (K - 1), about 2; that is L of an inner group of two layers that has lost nothing. The
more of a stream's writers have gone, the larger the part that the next one takes of what stays, as with channels: noise
over signal grows from (K - n) / n to (K - n + 1) / (n - 1), which is the last factor.

As long as a block's next channel matters much less than its average one, which the order of removal sees to at first,
the block is narrowed. It is dropped once what is left of it is alike, and much of its time does not shrink with its
inner width: its last norm, its addition, the stream's side of its layers, launches. That some blocks add more to the
stream than others is not looked at.
"""

from collections.abc import Sequence

import numpy as np

from cup.criteria import Ranking, View
from cup.tracing.groups import ChannelGroup


def losses_by_width(view: View, group: ChannelGroup, ranking: Ranking) -> np.ndarray:
    """float64 (C + 1,): the loss of the group at every width from 1 to C, descending; at 0 infinite."""
    energies = ranking.heights**2
    last = energies[-1:]
    gone = np.concatenate([[0.0], np.cumsum(energies)])[::-1]  # from width 1 to width C
    total = energies.sum() + last.sum()
    signal = np.ones(group.width) if total == 0 else 1 - gone / total
    losses = layers_of(view, group) * group.full_width / group.width / signal
    return np.concatenate([[np.inf], losses])


def loss_as_it_is(view: View, group: ChannelGroup) -> float:
    """The loss of a group at the width it has, ranked or not."""
    return layers_of(view, group) * group.full_width / group.width


def loss_of_block(branches: int, losses: Sequence[float], writers: int, now: int) -> float:
    """What is lost when a residual block goes.

    losses: of its groups, one or more, at their widths now. writers: layers that write its stream in the full
    network; now: those of them that are left, the block's included.
    """
    return branches * max(losses) * writers**2 / (now * (now - 1)) if now > 1 else np.inf


def layers_of(view: View, group: ChannelGroup) -> int:
    """The layers with weights that write or read the group; a grouped or depthwise convolution does both at once."""
    convolutions = [place for place in group.followers if view.weights.is_conv(place.module)]
    return len(group.producers) + len(group.consumers) + len(convolutions)
