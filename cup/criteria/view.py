"""What criteria and training methods may see of a network. They read it and leave it alone."""

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import Any, TypeVar

from torch import nn

from cup.complexity import Complexity, complexity
from cup.criteria.weights import Weights
from cup.tracing.groups import ChannelGroup
from cup.tracing.meta import meta_input

Value = TypeVar("Value")


class View:
    """A network at one moment, read only. What was read is kept: once the weights have changed, take a new view.

    model: in no parallel wrapper. groups: from `channel_groups(model)`, at the model's widths.
    dense: cost at full width; by default the current cost. now: the current cost; by default counted at first use.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[ChannelGroup],
        dense: Complexity | None = None,
        now: Complexity | None = None,
    ) -> None:
        self._model, self._groups, self._dense, self._now = model, tuple(groups), dense, now
        self._remembered: dict[Hashable, Any] = {}

    @property
    def model(self) -> nn.Module:
        return self._model

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:
        return self._groups

    @cached_property
    def now(self) -> Complexity:
        """Cost of the model as it is."""
        if self._now is not None:
            return self._now
        return complexity(self._model, meta_input(self._groups[0].network.input_shape, batch=1))

    @property
    def dense(self) -> Complexity:
        """Cost of the model at full width."""
        return self.now if self._dense is None else self._dense

    @property
    def reduction(self) -> float:
        """FR: FLOPs at full width over FLOPs now, in the paper's counting."""
        return self.dense.flops / self.now.flops

    @cached_property
    def weights(self) -> Weights:
        """The model's weights as read-only arrays; each layer is read once."""
        return Weights(self._model)

    def remember(self, key: Hashable, compute: Callable[[], Value]) -> Value:
        """What `compute` gives, computed once in this view.

        Criteria keep here what they need again when a group is ranked anew under other masks. key: starts with the
        criterion, so that two of them do not meet.
        """
        if key not in self._remembered:
            self._remembered[key] = compute()
        return self._remembered[key]
