"""Attention heads as channels: whole heads go, and what the modules say of them follows. Twins in float64."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from cup_twins import check_against_twin, plan_of, randomise
from torch import nn

import cup
from cup.tracing.heads import spell_out

WIDTH, HEADS = 12, 3


class Attention(nn.Module):
    """timm's spelling: one layer for query, key and value, numbers from attributes."""

    def __init__(self, fused=True):
        super().__init__()
        self.num_heads, self.head_dim, self.fused = HEADS, 5, fused
        self.attn_dim, self.scale = HEADS * 5, 5**-0.5
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * self.attn_dim), nn.Linear(self.attn_dim, WIDTH)

    def forward(self, x):
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=0.0)
        else:
            x = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, self.attn_dim))


class Separate(nn.Module):
    """Hugging Face's spelling: three layers, the number of heads is what is left, a mask that is the same for all."""

    def __init__(self):
        super().__init__()
        self.num_attention_heads, self.size = HEADS, 5
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * 5) for _ in range(3))
        self.out = nn.Linear(HEADS * 5, WIDTH)

    def forward(self, x):
        shape = (*x.shape[:-1], -1, self.size)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mask = x.mean(-1)[:, None, None, :]
        weights = F.softmax(torch.matmul(q, k.transpose(2, 3)) * 5**-0.5 + mask, dim=-1)
        return self.out(torch.matmul(weights, v).transpose(1, 2).contiguous().reshape(*x.shape[:-1], -1))


class Masked(Separate):
    def forward(self, x):
        shape = (*x.shape[:-1], -1, self.size)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mask = x.mean(-1)[:, None, None, :].expand(-1, -1, x.shape[1], -1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(*x.shape[:-1], -1))


class Counted(Attention):
    """The products of its two numbers instead of a third one; -1 for the channels of a head."""

    def forward(self, x):
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, self.num_heads * self.head_dim))


class Torch(nn.Module):
    """torch's own module; call: what it is given beside query, key and value."""

    def __init__(self, call=(), **options):
        super().__init__()
        self.inner, self.call = nn.MultiheadAttention(WIDTH, HEADS, **options), dict(call)

    num_heads = property(lambda self: self.inner.num_heads)

    def forward(self, x):
        x = x if self.inner.batch_first else x.transpose(0, 1)
        y, _ = self.inner(x, x, x, **self.call)
        return y if self.inner.batch_first else y.transpose(0, 1)


class Causal(Torch):
    def forward(self, x):
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        return self.inner(x, x, x, attn_mask=mask, is_causal=True, key_padding_mask=x[..., 0] * 0 > 1)[0]


class Block(nn.Module):
    """Attention and MLP on a residual stream that must stay."""

    def __init__(self, attention):
        super().__init__()
        self.embed, self.position = nn.Linear(4, WIDTH), nn.Parameter(torch.rand(7, WIDTH))
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(WIDTH), attention, nn.LayerNorm(WIDTH)
        self.fc1, self.fc2, self.fc = nn.Linear(WIDTH, 10), nn.Linear(10, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x):
        x = self.embed(x) + self.position
        x = x + self.attention(self.norm1(x))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.fc(x.mean(1))


FOLLOWED = {
    "fused": lambda: Attention(),
    "by hand": lambda: Attention(fused=False),
    "separate": Separate,
    "masked": Masked,
    "counted": Counted,
    "torch": lambda: Torch(call={"need_weights": False}, batch_first=True),
    "torch, tokens first": lambda: Torch(bias=False),
    "torch, causal": lambda: Causal(batch_first=True),
}


def built(attention):
    torch.manual_seed(0)
    return randomise(Block(attention)), torch.randn(4, 7, 4)


def heads_of(groups):
    return next(group for group in groups if group.name.startswith("attention") and group.name != "attention.out")


@pytest.mark.parametrize("case", list(FOLLOWED))
def test_whole_heads_go(case):
    model, tokens = built(FOLLOWED[case]())
    group = heads_of(check_against_twin(copy.deepcopy(model), tokens))
    assert (group.width, group.frozen, group.inner) == (HEADS, "", True)
    assert {place.module for place in group.consumers} <= {
        "attention.proj",
        "attention.out",
        "attention.inner.out_proj",
    }
    groups = cup.channel_groups(model, tokens)
    before = cup.complexity(model, tokens)
    plan = plan_of(groups, {group.name: (1,)})
    expected = cup.complexity_after(model, groups, plan, before)
    resized = cup.apply_plan(model, plan, groups)
    assert cup.complexity(model, tokens) == expected
    counts = [getattr(model.attention, name, None) for name in ("num_heads", "num_attention_heads")]
    assert sorted(counts, key=str) == [1, None]
    again = cup.channel_groups(model, tokens)
    assert [(one.name, one.width) for one in again] == [(one.name, one.width) for one in resized.groups]


class Shifted(Attention):
    """In training so many steps more stand in front of the views."""

    def __init__(self, more):
        super().__init__()
        self.more, self.shift = more, nn.Parameter(torch.rand(WIDTH))

    def forward(self, x):
        for _ in range(self.more if self.training else 0):
            x = x * 2.0
        return super().forward(x) + self.shift


@pytest.mark.parametrize("more", [3, 6, 9, 12])
def test_heads_go_where_evaluation_takes_other_steps(more):
    model, tokens = built(Shifted(more))
    assert heads_of(check_against_twin(model, tokens)).frozen == ""


def test_the_numbers_of_the_module_follow_and_a_heads_own_width_stays():
    model, tokens = built(Attention())
    groups = cup.channel_groups(model, tokens)
    cup.apply_plan(model, plan_of(groups, {"attention.qkv": (0, 2)}), groups)
    attention = model.attention
    assert (attention.num_heads, attention.attn_dim, attention.head_dim, attention.scale) == (2, 10, 5, 5**-0.5)
    assert attention.qkv.weight.shape == (30, WIDTH)
    assert attention.proj.weight.shape == (WIDTH, 10)


@pytest.mark.parametrize("attention", [Attention, lambda: Torch(batch_first=True)])
def test_a_carried_step_is_that_of_the_masked_twin(attention):
    model, tokens = built(attention())
    model, tokens = model.double(), tokens.double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(network, optimizer):
        optimizer.zero_grad()
        network(tokens).square().sum().backward()
        optimizer.step()

    step(model, optimizer)
    groups = cup.channel_groups(model, tokens)
    twin, twins = copy.deepcopy((model, optimizer))
    name, projections = heads_of(groups).name, projections_of(twin.attention)
    size = len(projections[0]) // 9
    with torch.no_grad():
        projections[2][:, size : 2 * size] = 0  # nobody hears the second head
    resized = cup.apply_plan(model, plan_of(groups, {name: (0, 2)}), groups)
    cup.carry_optimizer(optimizer, resized)
    step(model, optimizer)
    step(twin, twins)
    stays = [index for index in range(9 * size) if index // size % 3 != 1]
    for found, wanted in zip(projections_of(model.attention)[:2], projections, strict=False):
        assert torch.allclose(found, wanted[stays], rtol=1e-9, atol=1e-12)


def projections_of(attention):
    """Weight and bias in front of the heads, weight behind them."""
    if isinstance(attention, Torch):
        return attention.inner.in_proj_weight, attention.inner.in_proj_bias, attention.inner.out_proj.weight
    return attention.qkv.weight, attention.qkv.bias, attention.proj.weight


def test_the_ranking_of_a_head_is_that_of_all_its_rows():
    model, tokens = built(Attention())
    groups = cup.channel_groups(model, tokens)
    with torch.no_grad():
        model.attention.qkv.weight.view(3, HEADS, 5, WIDTH)[:, 1] *= 0.01
    plan = cup.plan_by_counts(model, groups, {"attention.qkv": 2}, cup.PlanOptions(criterion="l1"))
    assert plan.kept["attention.qkv"] == (0, 2)


class Streamed(nn.Module):
    """A residual stream that may go, too."""

    def __init__(self, first):
        super().__init__()
        self.embed, self.attention = nn.Linear(4, WIDTH), Torch(batch_first=first)
        self.norm, self.fc = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x):
        x = self.embed(x)
        return self.fc(self.norm(x + self.attention(x)).mean(1))


@pytest.mark.parametrize("first", [True, False])
def test_torchs_attention_is_cut_with_the_stream_around_it_and_comes_back(first):
    torch.manual_seed(0)
    model, tokens = randomise(Streamed(first)), torch.randn(4, 7, 4)
    fresh = copy.deepcopy(model)
    groups = check_against_twin(copy.deepcopy(model), tokens)
    assert {group.name: group.frozen for group in groups[:2]} == {"embed": "", "attention.inner": ""}
    before = cup.complexity(model, tokens)
    plan = plan_of(groups, {"embed": (0, 1, 5, 7), "attention.inner": (1,)})
    expected = cup.complexity_after(model, groups, plan, before)
    cup.apply_plan(model, plan, groups)
    assert cup.complexity(model, tokens) == expected
    assert model.attention.inner.in_proj_weight.shape == (12, 4)
    assert isinstance(model.attention.inner, nn.MultiheadAttention)
    cup.shrink_to(fresh, plan.new_widths, tokens)
    fresh.load_state_dict(model.state_dict())
    again = pickle.loads(pickle.dumps(fresh))
    assert torch.equal(again.eval()(tokens), model.eval()(tokens))


@pytest.mark.parametrize("norm_first", [True, False])
def test_torchs_encoder_is_looked_into(norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 10, dropout=0.0, batch_first=True, norm_first=norm_first)
    model = randomise(
        nn.Sequential(
            nn.Linear(4, WIDTH), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(WIDTH, 5)
        )
    )
    groups = check_against_twin(model, torch.randn(4, 7, 4))
    found = [(group.name, group.width, group.frozen) for group in groups[:-1]]
    parts = [("self_attn", HEADS, ""), ("linear1", 10, "")]
    layers = [(f"1.layers.{number}.{name}", *rest) for number in (0, 1) for name, *rest in parts]
    assert found == [("0", WIDTH, ""), *layers]


def test_torchs_encoder_takes_no_shortcut_through_what_was_cut():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 10, dropout=0.0, batch_first=True)
    model, tokens = randomise(nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(16, 5))), torch.randn(2, 7, 16)
    groups = cup.channel_groups(model, tokens)
    cup.apply_plan(model, plan_of(groups, {"0.layers.0.self_attn": (0, 2)}), groups)
    expected = model(tokens)
    with torch.no_grad():
        assert torch.allclose(model.eval()(tokens), expected, atol=1e-5)
        padded = model[0](tokens, src_key_padding_mask=PADDING)
        assert torch.allclose(padded, model[0].train()(tokens, src_key_padding_mask=PADDING), atol=1e-5)


PADDING = torch.arange(7).expand(2, 7) > torch.tensor([[4], [6]])

CALLS = {
    "self": lambda x, y: ((x, x, x), {}),
    "no weights": lambda x, y: ((x, x, x), {"need_weights": False}),
    "weights of each head": lambda x, y: ((x, x, x), {"average_attn_weights": False}),
    "cross": lambda x, y: ((x, y, y), {}),
    "three": lambda x, y: ((x, y, y * 2), {"need_weights": False}),
    "one sample": lambda x, y: ([x.flatten(0, 1)[:7]] * 3, {"key_padding_mask": PADDING[0]}),
    "padding": lambda x, y: ((x, x, x), {"key_padding_mask": PADDING}),
    "causal": lambda x, y: ((x, x, x), {"attn_mask": torch.ones(7, 7).triu(1).bool(), "is_causal": True}),
    "a mask for each head": lambda x, y: ((x, x, x), {"attn_mask": torch.rand(6, 7, 7).double()}),
    "two masks": lambda x, y: ((x, x, x), {"attn_mask": torch.rand(7, 7) > 0.9, "key_padding_mask": PADDING}),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("call", list(CALLS))
def test_the_spelt_out_attention_gives_what_torchs_gives(call, first):
    torch.manual_seed(0)
    module = randomise(nn.MultiheadAttention(WIDTH, HEADS, batch_first=first)).double()
    own = copy.deepcopy(module)
    spell_out(own)
    shape = (2, 7, WIDTH) if first else (7, 2, WIDTH)
    inputs, named = CALLS[call](torch.rand(shape).double(), torch.rand(shape).double())
    (found, weights), (wanted, theirs) = own(*inputs, **named), module(*inputs, **named)
    assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)
    assert weights is theirs is None or torch.allclose(weights, theirs, rtol=1e-12, atol=1e-12)


def test_the_spelt_out_attention_wants_the_mask_that_is_hinted_at():
    module, x = nn.MultiheadAttention(WIDTH, HEADS), torch.zeros(7, 2, WIDTH)
    spell_out(module)
    with pytest.raises(RuntimeError, match="give attn_mask"):
        module(x, x, x, is_causal=True)


class WeightsRead(Torch):
    def forward(self, x):
        y, weights = self.inner(x, x, x)
        return y * weights.mean((1, 2))[:, None, None]


class Cross(Torch):
    def forward(self, x):
        return self.inner(x, x.flip(1), x, need_weights=False)[0]


@pytest.mark.parametrize(
    "attention", [WeightsRead, Cross, lambda batch_first: Torch(batch_first=batch_first, add_zero_attn=True)]
)
def test_torchs_attention_that_cannot_be_cut_stays(attention):
    model, tokens = built(attention(batch_first=True))
    groups = check_against_twin(model, tokens)
    assert all(group.frozen for group in groups if group.name.startswith("attention"))


class FixedNumber(Attention):
    def forward(self, x):
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 3, 5).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FromTheStream(Attention):
    """A head's width is computed from the stream's, which stays when heads go."""

    def forward(self, x):
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, width * 5 // 4 // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mixed(Attention):
    """Talking heads: a head hears the others."""

    def __init__(self):
        super().__init__()
        self.talk = nn.Linear(HEADS, HEADS)

    def forward(self, x):
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1)).softmax(-1).softmax(1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, self.attn_dim))


class SameNumber(nn.Module):
    """A four that is not the module's number of heads, though they are equal; the view would run on one head, too."""

    def __init__(self):
        super().__init__()
        self.num_heads = 4
        self.q, self.out = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x):
        q = self.q(x).view(*x.shape[:2], 4, -1).transpose(1, 2)
        return self.out((q * q.mean(-1, keepdim=True)).transpose(1, 2).flatten(2))


class TimesVector(Attention):
    def forward(self, x):
        batch, tokens, _ = x.shape
        q, _, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        gain = torch.matmul(q, x.new_ones(self.head_dim))
        return self.proj((gain[..., None] * v).transpose(1, 2).reshape(batch, tokens, self.attn_dim))


@pytest.mark.parametrize("attention", [FixedNumber, FromTheStream, Mixed, SameNumber, TimesVector])
def test_heads_that_cannot_go_stay(attention):
    model, tokens = built(attention())
    assert heads_of(check_against_twin(model, tokens)).frozen


@pytest.mark.parametrize("product", [F.scaled_dot_product_attention, torch.matmul])
def test_operands_by_name_are_not_followed_and_break_nothing(product):
    class Named(Attention):
        def forward(self, x):
            q, k, v = (self.qkv(x).reshape(len(x), -1, 3, self.attn_dim)[:, :, part] for part in range(3))
            if product is torch.matmul:
                return self.proj(product(input=product(input=q, other=k.transpose(1, 2)), other=v))
            return self.proj(product(query=q, key=k, value=v))

    assert all(group.frozen for group in cup.channel_groups(Named(), torch.zeros(2, 4, WIDTH)))
