"""How torch takes memory, from a GPU and from a CPU. Without torch, which may read this at its import."""

import ctypes
import os

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The variable of torch's allocator, and its older name, which counts as well."""


def prefer_growing_segments() -> None:
    """Ask for segments that grow, unless the user has said anything about memory.

    A network that shrinks asks for other sizes after each cut; segments of fixed sizes would keep what fits no more.
    """
    if not any(name in os.environ for name in NAMES):
        os.environ[NAMES[0]] = "expandable_segments:True"


OF_GLIBC = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")
"""The variables of the C library's allocator."""
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""As in glibc's malloc.h."""


def keep_freed_memory() -> None:
    """Have this process keep what it frees for its next step, where glibc is the C library, unless the user has said
    anything about its memory.

    glibc gives large blocks back to the system, which clears each page when the next step asks for it again: the
    gradient of a convolution of 512 to 512 channels then takes two to three times as long, that of a narrow one does
    not, and the dense step looks slower than its work (docs/performance.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None and not any(name in os.environ for name in OF_GLIBC):
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # never
