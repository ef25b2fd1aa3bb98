"""When to cut and how deep: pure functions of the epoch. Epochs count from 1, as in the paper."""


def threshold_at(epoch: int, slope: float, offset: float) -> float:
    """t(e) = slope (e - 1) + offset, the paper's ramp (CUP-SS, step 6)."""
    return slope * (epoch - 1) + offset


def reduction_at(epoch: int, target: float, last_epoch: int) -> float:
    """The FLOPs reduction on a straight line from 1 at epoch 1 to `target` at `last_epoch` and after."""
    if epoch >= last_epoch:
        return target
    return 1 + (target - 1) * (epoch - 1) / (last_epoch - 1)


def is_cut_epoch(epoch: int, every: int, last_epoch: int) -> bool:
    """Whether the schedule cuts at the start of `epoch`: every `every` epochs from the first, and at the last one."""
    return epoch <= last_epoch and ((epoch - 1) % every == 0 or epoch == last_epoch)


def has_reached(reduction: float, target: float, tolerance: float) -> bool:
    """The stop rule: the FLOPs reduction is at the target, or below it by no more than the relative tolerance."""
    return reduction >= target * (1 - tolerance)
