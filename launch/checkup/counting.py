"""What a training step costs beside its arithmetic: operations that are launched, and reads that make the host wait."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero")
"""Operations of ATen whose result or shape the host has to know: `item`, `bool`, `torch.equal`, masks."""


class Operations(TorchDispatchMode):
    """While it is entered, counts operations by name. On a GPU each is a kernel or more, and each read waits for it.

    names: in order, without what only looks at a tensor in another way.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    @property
    def reads(self) -> list[str]:
        return [name for name in self.names if name in READS]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and function.overloadpacket.__name__ != "detach":
            self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@contextmanager
def synchronising_calls() -> Iterator[list[str]]:
    """Inside, the list takes `file:line` of every call that waits for the GPU (torch.cuda.set_sync_debug_mode)."""
    calls: list[str] = []
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield calls
        finally:
            torch.cuda.set_sync_debug_mode(before)
            calls += [f"{one.filename}:{one.lineno}" for one in caught if "synchronizing" in str(one.message)]
