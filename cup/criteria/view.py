"""What criteria and training methods may see of a network. They read it and leave it alone."""

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import Any, TypeVar

from torch import nn

from cup.complexity import Complexity, complexity
from cup.cost.model import Cost, CostByWidths
from cup.criteria.weights import Weights
from cup.errors import CupError
from cup.tracing.groups import ChannelGroup
from cup.tracing.meta import meta_input

Value = TypeVar("Value")


class View:
    """A network at one moment, read only. What was read is kept: once the weights have changed, take a new view.

    model: in no parallel wrapper. groups: from `channel_groups(model)`, at the model's widths.
    dense: FLOPs and the like at full width; by default the current ones. now: the current ones; by default counted at
    first use. cost: what a step costs, where that is asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[ChannelGroup],
        dense: Complexity | None = None,
        now: Complexity | None = None,
        cost: Cost | None = None,
    ) -> None:
        self._model, self._groups, self._dense, self._now, self._cost = model, tuple(groups), dense, now, cost
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

    @property
    def cost(self) -> Cost:
        """The cost model of a step. Raises CupError where this view has none."""
        if self._cost is None:
            raise CupError("this view has no cost model of a step")
        return self._cost

    @cached_property
    def seconds(self) -> CostByWidths:
        """What a step of this network costs, by widths, in the unit of `cost`."""
        return self.cost.of(self._model, self._groups)

    @property
    def speedup(self) -> float:
        """A step's cost at full width over its cost now."""
        return self.seconds.full / self.seconds.now

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
