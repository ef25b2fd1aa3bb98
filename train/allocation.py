"""How torch takes memory from a GPU. Without torch, which may read this at its import."""

import os

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The variable of torch's allocator, and its older name, which counts as well."""


def prefer_growing_segments() -> None:
    """Ask for segments that grow, unless the user has said anything about memory.

    A network that shrinks asks for other sizes after each cut; segments of fixed sizes would keep what fits no more.
    """
    if not any(name in os.environ for name in NAMES):
        os.environ[NAMES[0]] = "expandable_segments:True"
