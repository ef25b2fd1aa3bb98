"""torch.compile on a network's repeated blocks, where that pays.

Compiling takes about a minute and a resize makes it void, so blocks run compiled only where enough steps at the same
widths and image size lie ahead. No clock has a say in that: a resumed run compiles where the undisturbed one did.

Blocks are compiled inside DDP, which keeps the exchange of gradients beside the backward pass; a whole network in one
piece would exchange them after it. What cannot be compiled is an error: nothing falls back to eager silently.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from train.errors import ConfigError, TrainError


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost modules of classes that are the network's own and occur in it more than once."""
    counts = Counter(type(module) for module in model.modules() if not type(module).__module__.startswith("torch.nn"))

    def outermost(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            yield from [child] if counts[type(child)] > 1 else outermost(child)

    return list(outermost(model))


class BlockCompiler:
    """Compiles the repeated blocks of one network, and decides in which epochs they run compiled."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        *,
        enabled: bool,
        enough_steps: int,
        epochs: int,
        may_cut: Callable[[int], bool],
        image_side: Callable[[int], int],
    ) -> None:
        """blocks: the full network's `repeated_blocks`, changed in place; names and parameters stay. Cuts may have
        dropped some of them since, and have left a single one.

        enough_steps: optimizer steps ahead from which compiling pays. epochs: of the whole run. may_cut, image_side: of
        an epoch, as things stand when they are asked.
        Raises ConfigError if the network has no repeated blocks.
        """
        self.enabled = enabled
        self._enough_steps, self._epochs = enough_steps, epochs
        self._may_cut, self._image_side = may_cut, image_side
        self._is_fresh = True  # nothing is compiled yet at these widths and this image size
        if not enabled:
            return
        if not blocks:
            raise ConfigError("train.compile: found blocks, but the network has none that repeat; allowed for it: none")
        # The blocks share code, and torch counts what it compiles by code: one each, at one shape each.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * len(blocks))
        for block in blocks:
            block.compile(fullgraph=True, dynamic=False)
        torch.compiler.set_stance("force_eager")

    def at_epoch_start(self, epoch: int, steps: int, just_resized: bool, was_compiled: bool) -> tuple[bool, bool]:
        """Decide for this epoch of `steps` steps: (whether the blocks run compiled, whether the first step compiles).

        was_compiled: what this decided for the epoch before, or for this one where it is resumed in the middle.
        """
        if not self.enabled:
            return False, False
        changed = just_resized or self._image_side(epoch) != self._image_side(epoch - 1)
        compiled = self._epochs_alike(epoch) * steps >= self._enough_steps or (was_compiled and not changed)
        if changed or not compiled:
            torch.compiler.reset()  # frees what was compiled for other shapes
            self._is_fresh = True
        torch.compiler.set_stance("default" if compiled else "force_eager")
        compiles = compiled and self._is_fresh
        self._is_fresh = not compiled
        return compiled, compiles

    def _epochs_alike(self, epoch: int) -> int:
        """How many epochs from this one on are sure to have its widths and image size."""
        for later in range(epoch + 1, self._epochs + 1):
            if self._may_cut(later) or self._image_side(later) != self._image_side(later - 1):
                return later - epoch
        return self._epochs + 1 - epoch

    def paused(self) -> AbstractContextManager:
        """Inside, blocks run eagerly: evaluation would compile them once more."""
        return torch.compiler.set_stance("force_eager") if self.enabled else nullcontext()


@contextmanager
def compile_errors() -> Iterator[None]:
    """Turn what torch.compile raises inside into a TrainError of one line."""
    try:
        yield
    except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
        reason = str(error).strip().splitlines()[0]
        raise TrainError(f"torch.compile failed: {reason}; take --train.compile none, or --debug for more") from error
