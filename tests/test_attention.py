"""Attention equals torch's, hides the future, and refuses what cannot work."""

import ast
import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import outputs_and_gradients, randn
from torch import nn
from torch.testing import assert_close

from minillm.attention import (
    MultiHeadAttention,
    attention,
    attention_weights,
    causal_mask,
    check_dropout,
    head_dim_of,
    mask_for_heads,
    merge_heads,
    padding_mask,
    prefix_mask,
    reachability,
    split_heads,
    window_mask,
)
from minillm.loading import document_mask

NBS = Path(__file__).resolve().parents[1] / "nbs"
TIGHT = {"rtol": 1e-10, "atol": 1e-12}
LOOSE = {"rtol": 1e-4, "atol": 1e-5}
sizes = st.integers(1, 9)


def as_torch(ours, d_model):
    ref = nn.MultiheadAttention(
        d_model, ours.n_heads, batch_first=True,
        bias=ours.q_proj.bias is not None, dtype=ours.q_proj.weight.dtype,
    )
    parts = (ours.q_proj, ours.k_proj, ours.v_proj)
    with torch.no_grad():
        ref.in_proj_weight.copy_(torch.cat([p.weight for p in parts]))
        if ours.q_proj.bias is not None:
            ref.in_proj_bias.copy_(torch.cat([p.bias for p in parts]))
    ref.out_proj.load_state_dict(ours.o_proj.state_dict())
    return ref


# equal to the references


@settings(max_examples=60, deadline=None)
@given(
    T=sizes, S=sizes, K=st.integers(1, 8),
    density=st.floats(0.0, 1.0), seed=st.integers(0, 10_000),
)
def test_equal_to_torch_function_for_any_mask(T, S, K, density, seed):
    g = torch.Generator().manual_seed(seed)
    may = torch.rand(T, S, generator=g) < density
    q, k, v = (randn(2, 2, n, K, seed=seed + i)
               for i, n in enumerate((T, S, S)))
    ours = outputs_and_gradients(lambda *z: attention(*z, may), q, k, v)
    theirs = outputs_and_gradients(
        lambda *z: F.scaled_dot_product_attention(*z, attn_mask=may), q, k, v
    )
    assert_close(ours, theirs, **TIGHT)


@pytest.mark.parametrize("T", [1, 2, 17, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_causal_equals_torch_function(T, dtype):
    qkv = randn(3, 2, 3, T, 8, seed=T, dtype=dtype)
    ours = outputs_and_gradients(
        lambda *z: attention(*z, causal_mask(T)), *qkv
    )
    theirs = outputs_and_gradients(
        lambda *z: F.scaled_dot_product_attention(*z, is_causal=True), *qkv
    )
    assert_close(ours, theirs, **(LOOSE if dtype == torch.float32 else TIGHT))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("T", "S"), [(5, 5), (4, 7), (1, 1), (1, 6)])
def test_equal_to_torch_module_with_copied_weights(dtype, bias, T, S):
    tolerance = LOOSE if dtype == torch.float32 else TIGHT
    torch.manual_seed(0)
    ours = MultiHeadAttention(12, 3, bias=bias).to(dtype)
    ref = as_torch(ours, 12)
    a, b, c = (randn(2, n, 12, seed=i, dtype=dtype)
               for i, n in enumerate((T, S, S)))
    may = causal_mask(T, S)
    got = outputs_and_gradients(lambda *z: ours(*z, mask=may), a, b, c)
    wanted = outputs_and_gradients(
        lambda *z: ref(*z, attn_mask=~may)[0], a, b, c
    )
    assert_close(got, wanted, **tolerance)

    ours(a, b, c, may).square().sum().backward()
    ref(a, b, c, attn_mask=~may)[0].square().sum().backward()
    names = ("q_proj", "k_proj", "v_proj")
    stacked = torch.cat([getattr(ours, n).weight.grad for n in names])
    assert_close(stacked, ref.in_proj_weight.grad, **tolerance)
    assert_close(ours.o_proj.weight.grad, ref.out_proj.weight.grad,
                 **tolerance)
    if bias:
        stacked = torch.cat([getattr(ours, n).bias.grad for n in names])
        assert_close(stacked, ref.in_proj_bias.grad, **tolerance)


def test_padding_equals_torch_modules_key_padding_mask():
    ours = MultiHeadAttention(12, 3).double()
    ref = as_torch(ours, 12)
    x, lengths = randn(3, 6, 12), torch.tensor([6, 1, 4])
    blocked = torch.arange(6) >= lengths[:, None]
    got = outputs_and_gradients(
        lambda z: ours(z, mask=padding_mask(lengths, 6)), x
    )
    wanted = outputs_and_gradients(
        lambda z: ref(z, z, z, key_padding_mask=blocked)[0], x
    )
    assert_close(got, wanted, **TIGHT)


def test_maps_equal_torch_module():
    ours = MultiHeadAttention(12, 3).double()
    ref = as_torch(ours, 12)
    a, b = randn(2, 4, 12), randn(2, 6, 12, seed=1)
    _, maps = ref(a, b, b, attn_mask=~causal_mask(4, 6),
                  average_attn_weights=False)
    assert_close(ours.weights(a, b, causal_mask(4, 6)), maps, **TIGHT)


def test_gradients_of_attention_are_those_of_its_differences():
    q, k, v = (randn(2, n, 3, seed=n).requires_grad_() for n in (3, 4, 4))
    may = torch.tensor([[True] * 4, [False] * 4, [False, True, True, False]])
    assert torch.autograd.gradcheck(
        lambda *z: attention(*z, may), (q, k, v), check_batched_grad=False
    )


def test_einsum_over_heads_is_the_layer():
    layer = MultiHeadAttention(12, 3, bias=False).double()
    x = randn(2, 5, 12)
    Wq, Wk, Wv = (getattr(layer, n).weight.view(3, 4, 12)
                  for n in ("q_proj", "k_proj", "v_proj"))
    q, k, v = (torch.einsum("btd,hkd->bhtk", x, W) for W in (Wq, Wk, Wv))
    w = (torch.einsum("bhtk,bhsk->bhts", q, k) / 2).softmax(-1)
    Wo = layer.o_proj.weight.view(12, 3, 4)
    out = torch.einsum("bhts,bhsk,dhk->btd", w, v, Wo)
    assert_close(layer(x), out, **TIGHT)


# what moves what


@settings(max_examples=40, deadline=None)
@given(T=st.integers(1, 7), density=st.floats(0, 1), seed=st.integers(0, 999))
def test_reachability_reports_the_mask_it_was_given(T, density, seed):
    g = torch.Generator().manual_seed(seed)
    may = torch.rand(T, T, generator=g) < density
    torch.manual_seed(seed)
    layer = MultiHeadAttention(8, 2)
    x, other = randn(2, 1, T, 8, seed=seed, dtype=torch.float32)
    # a query moves its own output whenever it sees two keys or more
    wanted = may | (torch.eye(T, dtype=torch.bool)
                    & (may.sum(-1, keepdim=True) > 1))
    moved = reachability(lambda z: layer(z, mask=may), x, other)
    assert torch.equal(moved, wanted)


def test_attention_without_a_mask_knows_no_order():
    layer = MultiHeadAttention(8, 2).double()
    x, order = randn(1, 6, 8), torch.tensor([3, 0, 5, 1, 4, 2])
    assert_close(layer(x[:, order]), layer(x)[:, order], **TIGHT)
    memory = randn(1, 9, 8, seed=1)
    assert_close(layer(x, memory.flip(1)), layer(x, memory), **TIGHT)


# rows that see nothing, and large scores


def test_fully_masked_row_is_zero_with_zero_gradient():
    q, k, v = (randn(1, 1, 3, 4, seed=i).requires_grad_() for i in range(3))
    may = torch.tensor([[True, False, False], [False] * 3, [True] * 3])
    out = attention(q, k, v, may)
    out.square().sum().backward()
    assert out[0, 0, 1].eq(0).all()
    assert attention_weights(q, k, may)[0, 0, 1].eq(0).all()
    assert all(z.grad.isfinite().all() for z in (q, k, v))
    assert q.grad[0, 0, 1].eq(0).all()


def test_everything_masked_gives_zeros_not_nan():
    layer = MultiHeadAttention(8, 2, bias=False)
    x = randn(2, 3, 8, dtype=torch.float32).requires_grad_()
    out = layer(x, mask=torch.zeros(3, 3, dtype=torch.bool))
    out.sum().backward()
    assert out.eq(0).all() and x.grad.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16,
                                   torch.float16])
def test_large_scores_stay_finite(dtype):
    q = torch.full((1, 4, 8), 60.0, dtype=dtype)
    weights = attention_weights(q, q, causal_mask(4))
    assert weights.isfinite().all()
    assert_close(weights.float().sum(-1), torch.ones(1, 4), rtol=0, atol=1e-2)
    assert not weights[0][~causal_mask(4)].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16,
                                   torch.float16])
def test_very_negative_scores_stay_above_the_mask(dtype):
    q, k = torch.full((1, 8), -90.0), torch.full((3, 8), 90.0)
    weights = attention_weights(q.to(dtype), k.to(dtype),
                                torch.tensor([[True, True, False]]))
    assert weights.tolist() == [[0.5, 0.5, 0.0]]


def test_scores_are_scaled_by_root_of_head_dim():
    q, k = torch.tensor([[2.0, 0, 0, 0]]), torch.eye(4)
    e = math.exp(2.0 / math.sqrt(4))
    wanted = torch.tensor([[e, 1.0, 1.0, 1.0]]) / (e + 3)
    assert_close(attention_weights(q, k), wanted)


@pytest.mark.parametrize(("T", "S"), [(0, 3), (2, 0), (0, 0)])
def test_empty_sequences(T, S):
    out = attention(torch.ones(T, 4), torch.ones(S, 4), torch.ones(S, 5),
                    torch.ones(T, S, dtype=torch.bool))
    assert torch.equal(out, torch.zeros(T, 5))
    layer = MultiHeadAttention(8, 2)
    assert layer(torch.ones(2, T, 8), torch.ones(2, S, 8)).shape == (2, T, 8)


def test_one_token_returns_its_value():
    q, k, v = randn(3, 1, 2, 1, 4)
    assert torch.equal(attention(q, k, v, causal_mask(1)), v)


# masks


@settings(max_examples=40, deadline=None)
@given(T=st.integers(0, 8), more=st.integers(0, 5), window=sizes)
def test_causal_and_window_masks_by_their_definition(T, more, window):
    S = T + more
    causal, near = causal_mask(T, S), window_mask(T, window, S)
    assert causal.shape == near.shape == (T, S)
    for t in range(T):
        for s in range(S):
            gap = t + more - s  # the queries are the last T of S positions
            assert causal[t, s].item() == (gap >= 0)
            assert near[t, s].item() == (0 <= gap < window)


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4))
def test_padding_and_prefix_masks_by_their_definition(lengths):
    n = torch.tensor(lengths)
    real, prefix = padding_mask(n, 6), prefix_mask(6, n)
    assert real.shape == (len(lengths), 1, 6)
    assert prefix.shape == (len(lengths), 6, 6)
    for b, length in enumerate(lengths):
        assert torch.equal(prefix[b], prefix_mask(6, length))
        for s in range(6):
            assert real[b, 0, s].item() == (s < length)
            for t in range(6):
                assert prefix[b, t, s].item() == (s <= t or s < length)


def test_masks_compose():
    documents = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 1, 1, -1, -1]])
    lengths = torch.tensor([6, 4])
    both = (causal_mask(6) & padding_mask(lengths, 6)
            & window_mask(6, 3) & document_mask(documents))
    assert both.shape == (2, 6, 6)
    assert torch.equal(both[0], window_mask(6, 3) & document_mask(
        documents)[0])
    assert not both[1, 4:, 4:].any()
    layer, x = MultiHeadAttention(8, 2), randn(2, 6, 8, dtype=torch.float32)
    out = layer(x, mask=both)
    assert_close(out[1, 1:4], layer(x[1:, 1:4], mask=window_mask(3, 3))[0])
    assert torch.equal(window_mask(6, 6), causal_mask(6))
    assert torch.equal(prefix_mask(6, 0), causal_mask(6))
    assert prefix_mask(6, 6).all()


def test_mask_for_each_sequence_is_not_taken_for_heads():
    layer = MultiHeadAttention(6, 2)  # B == H: broadcasting alone would fit
    x = randn(2, 4, 6, dtype=torch.float32)
    masks = torch.stack([causal_mask(4), torch.ones(4, 4, dtype=torch.bool)])
    together = layer(x, mask=masks)
    for b in range(2):
        assert_close(together[b:b + 1], layer(x[b:b + 1], mask=masks[b]))


def test_padding_is_invisible():
    layer = MultiHeadAttention(6, 2)  # B == H again
    x = randn(2, 5, 6, dtype=torch.float32)
    real = padding_mask(torch.tensor([5, 2]), 5)
    for mask in (real, real.unsqueeze(1)):  # three dimensions, and four
        assert_close(layer(x, mask=mask)[1, :2], layer(x[1:, :2])[0])


# heads and the layer


def test_split_and_merge_are_inverse_views():
    x = randn(2, 5, 12)
    heads = split_heads(x, 3)
    assert heads.shape == (2, 3, 5, 4)
    assert heads.data_ptr() == x.data_ptr()
    assert torch.equal(merge_heads(heads), x)
    assert torch.equal(heads[:, 2], x[..., 8:12])


def test_dropout_acts_in_training_only():
    x = randn(1, 6, 8, dtype=torch.float32)
    layer = MultiHeadAttention(8, 2, dropout=0.5)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    plain = copy.deepcopy(layer)
    plain.dropout = 0.0
    assert torch.equal(layer(x), plain.train()(x))


def test_own_dropout_keeps_the_mean():
    q = randn(1, 1, 8)
    torch.manual_seed(0)
    many = attention(q.expand(4000, 1, 8), q, torch.ones(1, 1, 1).double(),
                     dropout=0.25)
    assert abs(many.mean().item() - 1.0) < 0.05
    assert set(many.flatten().tolist()) == {0.0, 1 / 0.75}


TWO = torch.ones(2, 2)


@pytest.mark.parametrize(("call", "parts"), [
    (lambda: head_dim_of(64, 5), ("64", "5", "divisors")),
    (lambda: MultiHeadAttention(64, 0), ("n_heads=0", "choose")),
    (lambda: MultiHeadAttention(10, 4), ("d_model=10", "n_heads=4")),
    (lambda: MultiHeadAttention(8, 2, dropout=1.5), ("1.5", "[0, 1)")),
    (lambda: check_dropout(1.0), ("dropout=1.0", "0.0 switches")),
    (lambda: check_dropout(-0.1), ("dropout=-0.1", "[0, 1)")),
    (lambda: check_dropout(math.nan), ("dropout=nan", "[0, 1)")),
    (lambda: check_dropout("0.1"), ("dropout='0.1'", "[0, 1)")),
    (lambda: MultiHeadAttention(8, 1)(torch.ones(8, 8)),
     ("(8, 8)", "unsqueeze")),
    (lambda: split_heads(torch.ones(1, 2, 7), 2), ("7", "n_heads=2")),
    (lambda: causal_mask(4, 3), ("S=3", "T=4", "S >= T")),
    (lambda: causal_mask(-1), ("T=-1",)),
    (lambda: window_mask(4, 0), ("window=0", "at least 1")),
    (lambda: window_mask(4, 2, 3), ("S=3", "T=4")),
    (lambda: padding_mask(torch.tensor([2, 7]), 5), ("7", "S=5")),
    (lambda: padding_mask(torch.tensor([[2, 1]]), 5), ("(1, 2)", "(B,)")),
    (lambda: padding_mask(torch.tensor([2.0]), 5), ("float32", "integer")),
    (lambda: prefix_mask(5, 6), ("6", "T=5")),
    (lambda: prefix_mask(5, torch.tensor([1, -2])), ("-2", "T=5")),
    (lambda: attention_weights(TWO, TWO, TWO), ("float32", "bool")),
    (lambda: attention_weights(TWO, torch.ones(2, 3)),
     ("2", "3", "same width")),
    (lambda: attention(TWO, TWO, torch.ones(3, 2)),
     ("2 keys", "3 values", "same length")),
    (lambda: MultiHeadAttention(2, 1)(TWO[None], TWO[None],
                                      torch.ones(1, 5, 2)),
     ("2 keys", "5 values")),
    (lambda: prefix_mask(5, 1.5), ("float32", "whole")),
    (lambda: mask_for_heads(causal_mask(3), 3, 4), ("(3, 3)", "(3, 4)")),
    (lambda: mask_for_heads(torch.ones(3).bool(), 3, 3), ("(3,)", "pass")),
    (lambda: reachability(lambda z: z, torch.arange(3)[None],
                          torch.tensor([[1, 1, 0]])), ("[1]", "differs")),
    (lambda: reachability(lambda z: z, torch.ones(2, 3, 1),
                          torch.zeros(2, 3, 1)), ("(2, 3, 1)", "one")),
])
def test_bad_input_names_value_and_remedy(call, parts):
    with pytest.raises(ValueError) as error:
        call()
    assert all(p in str(error.value) for p in parts), str(error.value)


# the chapter


def statements_of(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    found = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            for node in ast.parse("".join(cell["source"])).body:
                source = ast.unparse(node)
                found[getattr(node, "name", source)] = source
    return found


@pytest.mark.parametrize("chapter", ["attention"])
def test_solutions_run_the_chapters_own_checks(chapter):
    asked = {n: s for n, s in statements_of(NBS / f"{chapter}.ipynb").items()
             if n.startswith("check_exercise")}
    solved = statements_of(NBS / "solutions" / f"{chapter}.ipynb")
    assert len(asked) >= 8
    for name, source in asked.items():
        assert solved.get(name) == source, f"{name} differs in the solutions"
        assert any(s.startswith(f"{name}(") for s in solved), f"{name} not run"
