"""What the training loop works with. Both classes are complete when they are constructed (train/build.py)."""

from collections.abc import Callable
from dataclasses import dataclass

from data import Loader
from train.log.ledger import Ledger
from train.log.sinks import Sinks
from train.loop.config import TrainConfig
from train.loop.mixing import Mixing
from train.loop.nonfinite import StepGuard
from train.loop.progress import EpochSoFar, Progress
from train.loop.readback import Readback
from train.loop.teacher import Teacher
from train.loop.watch import Watch
from train.methods import Method
from train.network.compiling import BlockCompiler
from train.network.optim import OptimConfig
from train.network.state import TrainState
from train.resizer import Resizer
from train.world import World


@dataclass
class TrainLoop:
    """What an epoch of steps needs, on one rank."""

    config: TrainConfig
    optim: OptimConfig
    world: World
    loader: Loader
    mix: Mixing
    state: TrainState
    method: Method
    ledger: Ledger
    guard: StepGuard | None = None
    """Leaves out steps that are not finite; None with train.nonfinite: stop."""
    teacher: Teacher | None = None
    """Takes its share of the loss of each step."""


@dataclass
class Trainer:
    """A whole run, on one rank."""

    loop: TrainLoop
    val_loader: Loader
    resizer: Resizer
    compiler: BlockCompiler
    progress: Progress
    so_far: EpochSoFar | None
    """The epoch that is under way; None between two epochs."""
    is_resumed: bool
    """From a resume until this process's first training step."""
    sinks: Sinks
    watch: Watch
    readback: Readback
    batch_size: int
    """Images a step, all ranks together."""
    image_size: Callable[[int], int]
    """Epoch (1, 2, ...) -> side of its training images, pixels."""
    save: Callable[["Trainer", bool], None]
    """Begins to write a checkpoint of this trainer; the flag says whether it is the best so far. All ranks call it."""
    finish_save: Callable[["Trainer"], None]
    """Waits until it is written, if one is under way, and notes what became of it. All ranks call it."""

    @property
    def config(self) -> TrainConfig:
        return self.loop.config

    @property
    def world(self) -> World:
        return self.loop.world

    @property
    def state(self) -> TrainState:
        return self.loop.state

    @property
    def method(self) -> Method:
        return self.loop.method

    @property
    def ledger(self) -> Ledger:
        return self.loop.ledger
