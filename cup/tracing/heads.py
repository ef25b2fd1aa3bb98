"""Attention heads: the attributes by which a network's own attention modules count them, and torch's own attention.

Most code splits its channels by a number that the module keeps: `x.view(batch, tokens, self.num_heads, self.head_dim)`.
When heads go, so does that number; head_dim stays, and with it the scale head_dim ** -0.5. Whether the code takes its
numbers from there is not looked up but tried out (retrace.py).

Shapes: N samples, T tokens, S tokens that are attended to, H heads of D channels each, E channels before and behind.
"""

import torch
import torch.nn.functional as F
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


class CutAttention(nn.MultiheadAttention):
    """What `nn.MultiheadAttention` becomes once some of its heads, or of the channels around it, are gone.

    torch's own code holds a head to be embed_dim / num_heads wide, so it knows no fewer heads at the same embed_dim.
    This does the same with in_proj_weight of 3HD x E, for any H. Parameters, names, arguments and results are those of
    the class above; it is never built, but a module's class is set to it (`spell_out`), so that the module stays the
    same object.
    """

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `nn.MultiheadAttention.forward`; nested tensors aside."""
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask, as in nn.MultiheadAttention: give attn_mask, too")
        single = query.dim() == 2
        q, k, v = self._heads(query, key, value)
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout, weights = self.dropout if self.training else 0.0, None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = F.dropout(F.softmax(scores if mask is None else scores + mask, dim=-1), dropout)
            x = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        x = self.out_proj(x.transpose(1, 2).flatten(2))
        if single:
            return x.squeeze(0), None if weights is None else weights.squeeze(0)
        return x if self.batch_first else x.transpose(0, 1), weights

    def _heads(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(N, H, T, D), and twice (N, H, S, D)."""
        if query is key and key is value:
            x = self._batched(query)
            qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
            qkv = qkv.view(x.shape[0], x.shape[1], 3, self.num_heads, self.head_dim)
            return qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weights = self.in_proj_weight.chunk(3)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        parts = (self._batched(query), self._batched(key), self._batched(value))
        return tuple(
            F.linear(x, weight, bias).view(x.shape[0], x.shape[1], self.num_heads, self.head_dim).transpose(1, 2)
            for x, weight, bias in zip(parts, weights, biases, strict=True)
        )

    def _batched(self, x: torch.Tensor) -> torch.Tensor:
        """(N, T, E)."""
        if x.dim() == 2:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _mask(
        self, attn_mask: torch.Tensor | None, key_padding_mask: torch.Tensor | None, q: torch.Tensor
    ) -> torch.Tensor | None:
        """Both masks as one that is added to the scores, (N, H, T, S) or of length one where it is for all."""
        if attn_mask is not None and attn_mask.dim() == 3:
            if len(attn_mask) != (needed := q.shape[0] * self.num_heads):  # as torch's own does
                raise RuntimeError(f"attn_mask: found {len(attn_mask)} masks, needed {needed}: samples x heads now")
            attn_mask = attn_mask.view(-1, self.num_heads, *attn_mask.shape[1:])
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.view(-1, 1, 1, key_padding_mask.shape[-1])
        masks = [_added(mask, q.dtype) for mask in (attn_mask, key_padding_mask) if mask is not None]
        return masks[0] + masks[1] if len(masks) == 2 else masks[0] if masks else None


def _added(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask that says True for what is not attended to, as numbers to add to the scores."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def can_be_cut(module: nn.Module) -> bool:
    """Whether it is torch's attention with one matrix for query, key and value, and nothing else that is special."""
    return (
        type(module) in (nn.MultiheadAttention, CutAttention)
        and "forward" not in vars(module)
        and isinstance(module._parameters.get("in_proj_weight"), nn.Parameter)
        and module.bias_k is None
        and not module.add_zero_attn
    )


def spell_out(module: nn.MultiheadAttention) -> None:
    """Make it a `CutAttention`, in place, with the widths that its parameters have."""
    module.__class__ = CutAttention
    module._qkv_same_embed_dim = False  # tells nn.TransformerEncoderLayer to leave its own shortcut for it alone
    module.num_heads = module.in_proj_weight.shape[0] // (3 * module.head_dim)
    module.embed_dim = module.kdim = module.vdim = module.in_proj_weight.shape[1]


def stop_shortcuts(model: nn.Module) -> None:
    """Keep torch's encoders from packing padded samples for their layers' shortcut, which `CutAttention` has not."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(m, CutAttention) for m in module.modules()):
            module.use_nested_tensor = False
