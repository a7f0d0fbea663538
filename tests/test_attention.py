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
from torch import nn
from torch.testing import assert_close

from minillm.attention import (
    CausalSelfAttention,
    MultiHeadAttention,
    attention,
    attention_weights,
    causal_mask,
    head_dim_of,
    mask_for_heads,
    merge_heads,
    reachability,
    split_heads,
)

NBS = Path(__file__).resolve().parents[1] / "nbs"
TIGHT = {"rtol": 1e-10, "atol": 1e-12}


def randn(*shape, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=dtype, generator=g)


def outputs_and_gradients(fn, *inputs):
    inputs = [z.clone().requires_grad_() for z in inputs]
    out = fn(*inputs)
    return [out, *torch.autograd.grad(out, inputs, randn(*out.shape, seed=9))]


def as_torch(ours, d_model):
    ref = nn.MultiheadAttention(
        d_model, ours.n_heads, batch_first=True,
        bias=ours.q_proj.bias is not None, dtype=torch.float64,
    )
    parts = (ours.q_proj, ours.k_proj, ours.v_proj)
    with torch.no_grad():
        ref.in_proj_weight.copy_(torch.cat([p.weight for p in parts]))
        if ours.q_proj.bias is not None:
            ref.in_proj_bias.copy_(torch.cat([p.bias for p in parts]))
    ref.out_proj.load_state_dict(ours.o_proj.state_dict())
    return ref


@settings(max_examples=60, deadline=None)
@given(
    T=st.integers(1, 9), S=st.integers(1, 9), K=st.integers(1, 8),
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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("T", "S"), [(5, 5), (4, 7)])
def test_equal_to_torch_module_with_copied_weights(bias, T, S):
    ours = MultiHeadAttention(12, 3, bias=bias).double()
    ref = as_torch(ours, 12)
    a, b, c = randn(2, T, 12), randn(2, S, 12, seed=1), randn(2, S, 12, seed=2)
    may = causal_mask(T, S)
    got = outputs_and_gradients(lambda *z: ours(*z, mask=may), a, b, c)
    wanted = outputs_and_gradients(
        lambda *z: ref(*z, attn_mask=~may)[0], a, b, c
    )
    assert_close(got, wanted, **TIGHT)

    ours(a, b, c, may).square().sum().backward()
    ref(a, b, c, attn_mask=~may)[0].square().sum().backward()
    stacked = [getattr(ours, n).weight.grad
               for n in ("q_proj", "k_proj", "v_proj")]
    assert_close(torch.cat(stacked), ref.in_proj_weight.grad, **TIGHT)
    assert_close(ours.o_proj.weight.grad, ref.out_proj.weight.grad, **TIGHT)


def test_maps_equal_torch_module():
    ours = MultiHeadAttention(12, 3).double()
    ref = as_torch(ours, 12)
    a, b = randn(2, 4, 12), randn(2, 6, 12, seed=1)
    _, maps = ref(a, b, b, attn_mask=~causal_mask(4, 6),
                  average_attn_weights=False)
    assert_close(ours.weights(a, b, causal_mask(4, 6)), maps, **TIGHT)


@pytest.mark.parametrize("bias", [True, False])
def test_causal_engine_equals_readable_version(bias):
    fast = CausalSelfAttention(16, 4, bias=bias).double()
    slow = MultiHeadAttention(16, 4, bias=bias).double()
    slow.load_state_dict(fast.state_dict())
    x = randn(3, 11, 16)
    got = outputs_and_gradients(fast, x)
    wanted = outputs_and_gradients(
        lambda z: slow(z, mask=causal_mask(11)), x
    )
    assert_close(got, wanted, **TIGHT)


def test_causal_attention_hides_the_future():
    layer = CausalSelfAttention(8, 2)
    x = randn(1, 7, 8, dtype=torch.float32)
    assert torch.equal(reachability(layer, x, x + 1), causal_mask(7))


def test_reachability_reports_the_mask_it_was_given():
    g = torch.Generator().manual_seed(3)
    may = torch.rand(6, 6, generator=g) < 0.5
    layer = MultiHeadAttention(8, 2)
    x = randn(1, 6, 8, dtype=torch.float32)
    # a query moves its own output whenever it sees two keys or more
    wanted = may | (torch.eye(6, dtype=torch.bool)
                    & (may.sum(-1, keepdim=True) > 1))
    moved = reachability(lambda z: layer(z, mask=may), x, x + 1)
    assert torch.equal(moved, wanted)


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


def test_scores_are_scaled_by_root_of_head_dim():
    q, k = torch.tensor([[2.0, 0, 0, 0]]), torch.eye(4)
    e = math.exp(2.0 / math.sqrt(4))
    wanted = torch.tensor([[e, 1.0, 1.0, 1.0]]) / (e + 3)
    assert_close(attention_weights(q, k), wanted)


def test_mask_for_each_sequence_is_not_taken_for_heads():
    layer = MultiHeadAttention(6, 2)  # B == H: broadcasting alone would fit
    x = randn(2, 4, 6, dtype=torch.float32)
    masks = torch.stack([causal_mask(4), torch.ones(4, 4, dtype=torch.bool)])
    together = layer(x, mask=masks)
    for b in range(2):
        assert_close(together[b:b + 1], layer(x[b:b + 1], mask=masks[b]))


def test_padding_is_invisible():
    layer = MultiHeadAttention(6, 2)
    x = randn(2, 5, 6, dtype=torch.float32)
    real = (torch.arange(5) < torch.tensor([[5], [2]]))[:, None, None, :]
    assert_close(layer(x, mask=real)[1, :2], layer(x[1:, :2])[0])


def test_split_and_merge_are_inverse_views():
    x = randn(2, 5, 12)
    heads = split_heads(x, 3)
    assert heads.shape == (2, 3, 5, 4)
    assert heads.data_ptr() == x.data_ptr()
    assert torch.equal(merge_heads(heads), x)
    assert torch.equal(heads[:, 2], x[..., 8:12])


@pytest.mark.parametrize(("T", "S"), [(1, 1), (3, 3), (2, 5)])
def test_causal_mask_aligns_the_last_query_with_the_last_key(T, S):
    may = causal_mask(T, S)
    for t in range(T):
        for s in range(S):
            assert may[t, s].item() == (s <= t + S - T)


def test_dropout_acts_in_training_only():
    x = randn(1, 6, 8, dtype=torch.float32)
    for layer in (CausalSelfAttention(8, 2, dropout=0.5),
                  MultiHeadAttention(8, 2, dropout=0.5)):
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


@pytest.mark.parametrize(("call", "parts"), [
    (lambda: head_dim_of(64, 5), ("64", "5", "divisors")),
    (lambda: MultiHeadAttention(64, 0), ("n_heads=0", "choose")),
    (lambda: CausalSelfAttention(10, 4), ("d_model=10", "n_heads=4")),
    (lambda: causal_mask(4, 3), ("S=3", "T=4", "S >= T")),
    (lambda: attention_weights(torch.ones(2, 2), torch.ones(2, 2),
                               torch.zeros(2, 2)), ("float32", "bool")),
    (lambda: mask_for_heads(causal_mask(3), 3, 4), ("(3, 3)", "(3, 4)")),
    (lambda: reachability(lambda z: z, torch.arange(3)[None],
                          torch.tensor([[1, 1, 0]])), ("[1]", "differs")),
    (lambda: mask_for_heads(torch.ones(3).bool(), 3, 3), ("(3,)", "pass")),
])
def test_bad_input_names_value_and_remedy(call, parts):
    with pytest.raises(ValueError) as error:
        call()
    assert all(p in str(error.value) for p in parts), str(error.value)


def statements_of(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    found = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            for node in ast.parse("".join(cell["source"])).body:
                source = ast.unparse(node)
                found[getattr(node, "name", source)] = source
    return found


@pytest.mark.parametrize("chapter", ["attention", "transformer"])
def test_solutions_run_the_chapters_own_checks(chapter):
    asked = {n: s for n, s in statements_of(NBS / f"{chapter}.ipynb").items()
             if n.startswith("check_exercise")}
    solved = statements_of(NBS / "solutions" / f"{chapter}.ipynb")
    assert len(asked) >= 3
    for name, source in asked.items():
        assert solved.get(name) == source, f"{name} differs in the solutions"
        assert any(s.startswith(f"{name}(") for s in solved), f"{name} not run"
