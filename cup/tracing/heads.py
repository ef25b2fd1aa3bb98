"""Attention heads: the attributes by which a network's own attention modules count them.

Most code splits its channels by a number that the module keeps: `x.view(batch, tokens, self.num_heads, self.head_dim)`.
When heads go, so does that number; head_dim stays, and with it the scale head_dim ** -0.5. Whether the code takes its
numbers from there is not looked up but tried out (retrace.py).
"""

from torch import nn

_COUNTS = (
    *("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads"),
    *("num_kv_heads", "num_key_value_heads"),
)
_WIDTHS = ("attn_dim", "all_head_size", "inner_dim", "embed_dim", "attention_dim", "hidden_size", "dim_attn")
"""What modules call the channels of all their heads together."""


def head_count(module: nn.Module) -> int | None:
    """How many heads the module says that it has; None for one that has none, and for torch's own."""
    if type(module).__module__.startswith("torch.nn.") or isinstance(getattr(module, "weight", None), nn.Parameter):
        return None
    counts = (vars(module).get(name) for name in _COUNTS)
    return next((count for count in counts if type(count) is int and count > 0), None)


def set_head_count(module: nn.Module, heads: int) -> None:
    """Bring the module's numbers in line with so many heads left, each as wide as before."""
    before = head_count(module)
    for name in _COUNTS:
        if vars(module).get(name) == before:
            setattr(module, name, heads)
    for name in _WIDTHS:
        width = vars(module).get(name)
        if type(width) is int and width % before == 0:
            setattr(module, name, width // before * heads)
