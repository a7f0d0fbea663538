"""Tiles equal the matrix, forward and backward, and the counts are right."""

import math
from functools import partial, reduce

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import outputs_and_gradients, randn
from torch.testing import assert_close

from minillm.attention import attention, causal_mask
from minillm.flash import (
    Partial,
    TilePlan,
    Traffic,
    attend_tile,
    flash_attention,
    flash_traffic,
    merge_partial,
    online_softmax,
    tile_that_fits,
)

TIGHT = {"rtol": 1e-9, "atol": 1e-11}
sizes = st.integers(1, 20)
tiles = st.tuples(st.integers(1, 24), st.integers(1, 24))


@settings(max_examples=80)
@given(T=sizes, more=st.integers(0, 12), tile=tiles, seed=st.integers(0, 99),
       causal=st.booleans(), masked=st.booleans(), scale=st.sampled_from(
           [1e-3, 1.0, 300.0]))
def test_equal_to_the_matrix_and_to_torch(
    T, more, tile, seed, causal, masked, scale
):
    S = T + more if causal else max(1, (T + 3 * more) % 23)
    q, k, v = (randn(2, 3, n, 5, seed=seed + i) * scale**0.5
               for i, n in enumerate((T, S, S)))
    may = torch.ones(T, S, dtype=torch.bool)
    mask = None
    if masked:
        g = torch.Generator().manual_seed(seed)
        mask = torch.rand(2, 1, T, S, generator=g) < 0.5
        may = may & mask
    if causal:
        may = may & causal_mask(T, S)
    ours = outputs_and_gradients(
        partial(flash_attention, mask=mask, causal=causal, tile=tile), q, k, v)
    naive = outputs_and_gradients(partial(attention, mask=may), q, k, v)
    engine = outputs_and_gradients(
        partial(F.scaled_dot_product_attention, attn_mask=may), q, k, v)
    assert_close(ours, naive, **TIGHT)
    assert_close(ours, engine, **TIGHT)


@settings(max_examples=20)
@given(T=st.integers(1, 70), tile=tiles, seed=st.integers(0, 99))
def test_equal_to_torch_in_float32(T, tile, seed):
    x = [randn(1, 2, T, 16, seed=seed + i, dtype=torch.float32)
         for i in range(3)]
    ours = outputs_and_gradients(
        partial(flash_attention, causal=True, tile=tile), *x)
    theirs = outputs_and_gradients(
        partial(F.scaled_dot_product_attention, is_causal=True), *x)
    assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(causal, masked):
    q, k, v = (randn(2, n, 3, seed=i).requires_grad_()
               for i, n in enumerate((5, 7, 7)))
    mask = randn(5, 7, seed=5) < 0.5 if masked else None
    if masked:
        mask[2] = False
    fn = partial(flash_attention, mask=mask, causal=causal, tile=(2, 3))
    assert torch.autograd.gradcheck(fn, (q, k, v))


def test_the_gradient_is_not_differentiable_twice_in_silence():
    x = [randn(4, 3, seed=i).requires_grad_() for i in range(3)]
    (dq,) = torch.autograd.grad(flash_attention(*x).square().sum(), x[0],
                                create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        dq.sum().backward()


@settings(max_examples=40)
@given(cuts=st.lists(st.integers(0, 30), max_size=6), data=st.data())
def test_parts_join_in_any_order(cuts, data):
    s, v = 50 * randn(4, 30), randn(30, 2, seed=1)
    s[1, :10], s[2] = -math.inf, -math.inf
    edges = sorted({0, 30, *cuts})
    parts = [attend_tile(s[:, a:b], v[a:b]) for a, b in zip(edges, edges[1:])]
    parts = data.draw(st.permutations(parts))
    at = data.draw(st.integers(1, len(parts)))
    halves = [reduce(merge_partial, p) for p in (parts[:at], parts[at:]) if p]
    out, lse = reduce(merge_partial, halves).finish()
    want = s.softmax(-1).nan_to_num(0.0) @ v
    assert_close(out, want, **TIGHT)
    assert_close(lse, s.logsumexp(-1), **TIGHT)


def test_a_part_without_keys_changes_nothing():
    some = attend_tile(randn(3, 4), randn(4, 2, seed=1))
    none = attend_tile(torch.full((3, 4), -math.inf).double(), randn(4, 2))
    assert none.total.eq(0).all() and none.mixed.eq(0).all()
    assert_close(merge_partial(some, none), some)
    assert_close(merge_partial(none, some), some)
    out, lse = merge_partial(none, none).finish()
    assert out.eq(0).all() and (lse == -math.inf).all()


def test_a_tile_may_have_no_keys():
    some = attend_tile(randn(2, 3, 4), randn(2, 4, 5, seed=1))
    none = attend_tile(randn(2, 3, 0), randn(2, 0, 5))
    assert none.mixed.shape == (2, 3, 5) and none.total.eq(0).all()
    assert_close(merge_partial(none, some), some)
    assert_close(merge_partial(some, none), some)


def test_huge_scores_do_not_overflow():
    s = torch.tensor([[1e4, -1e4, 9999.0]])
    out, lse = online_softmax((s[:, i:i + 1], torch.eye(3)[i:i + 1])
                              for i in range(3)).finish()
    assert_close(out, s.softmax(-1))
    assert_close(lse, s.logsumexp(-1))
    assert online_softmax([]) is None
    low = attend_tile(s - 1e5, torch.eye(3)).finish()[0]
    assert_close(low, s.softmax(-1))


def test_nothing_to_do():
    for T, S in ((0, 5), (5, 0), (0, 0), (1, 1)):
        q, k, v = randn(2, T, 3), randn(2, S, 3), randn(2, S, 4)
        got = outputs_and_gradients(flash_attention, q, k, v)
        assert_close(got, outputs_and_gradients(attention, q, k, v))
        assert got[0].shape == (2, T, 4)


def test_a_query_that_may_look_nowhere():
    x = [randn(4, 3, seed=i) for i in range(3)]
    mask = causal_mask(4)
    mask[1] = False
    out, dq, _, _ = got = outputs_and_gradients(
        partial(flash_attention, mask=mask, tile=(2, 2)), *x)
    assert out[1].eq(0).all() and dq[1].eq(0).all()
    assert all(z.isfinite().all() for z in got)


def test_shapes_broadcast_and_gradients_are_summed():
    q, k, v = randn(2, 3, 4, 5, 6), randn(2, 3, 1, 7, 6), randn(7, 8)
    for mask in (None, randn(7, seed=3) < 1, randn(5, 1, seed=4) < 1,
                 randn(3, 1, 5, 7, seed=5) < 1):
        ours = outputs_and_gradients(
            partial(flash_attention, mask=mask, tile=(2, 3)), q, k, v)
        naive = outputs_and_gradients(partial(attention, mask=mask), q, k, v)
        assert_close(ours, naive, **TIGHT)


def test_a_mask_alone_may_add_dimensions():
    q, k, v = randn(5, 6), randn(7, 6), randn(7, 6)
    mask = randn(4, 5, 7, seed=3) < 0.5
    assert_close(flash_attention(q, k, v, mask), attention(q, k, v, mask))


def test_columns_may_be_strided():
    x = [randn(2, 6, 3, 4, seed=i).transpose(1, 2) for i in range(3)]
    assert_close(outputs_and_gradients(flash_attention, *x),
                 outputs_and_gradients(attention, *x), **TIGHT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_have_wide_sums(dtype):
    S = 4096
    q, k = torch.zeros(1, 8, dtype=dtype), torch.zeros(S, 8, dtype=dtype)
    v = torch.ones(S, 4, dtype=dtype)
    q, k, v = (z.requires_grad_() for z in (q, k, v))
    out = flash_attention(q, k, v, tile=(1, 1))  # a bfloat16 sum ends at 256
    assert out.dtype == dtype and out.eq(1).all()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
            lambda z: kept.append(z) or z, lambda z: z):
        flash_attention(q, k, v, tile=(1, 16))
    lse = kept[-1]
    assert lse.dtype == torch.float32
    assert_close(lse, torch.full_like(lse, math.log(S)))
    out.sum().backward()
    assert q.grad.dtype == v.grad.dtype == dtype
    assert_close(v.grad.float(), torch.full((S, 4), 1 / S))


def test_nothing_of_the_size_of_the_matrix_is_kept():
    q, k, v = (randn(512, 4, seed=i).requires_grad_() for i in range(3))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
            lambda z: kept.append(z.numel()) or z, lambda z: z):
        flash_attention(q, k, v)
    assert sum(kept) == 4 * 512 * 4 + 512


@settings(max_examples=40)
@given(T=sizes, S=sizes, K=st.integers(1, 6), tile=tiles)
def test_formulas_equal_the_counts(T, S, K, tile):
    q, k, v = (randn(n, K, seed=i) for i, n in enumerate((T, S, S)))
    new = Traffic()
    out = flash_attention(q, k, v, tile=tile, traffic=new)
    assert_close(out, attention(q, k, v), **TIGHT)
    assert new.total == flash_traffic(T, S, K, tile)
    if S >= T:
        new = Traffic()
        flash_attention(q, k, v, causal=True, tile=tile, traffic=new)
        assert new.total == flash_traffic(T, S, K, tile, causal=True)
        assert new.total <= flash_traffic(T, S, K, tile)


def test_backward_is_counted_and_tiles_are_skipped_there_too():
    T, K, tile = 24, 4, (4, 6)
    q, k, v = (randn(T, K, seed=i).requires_grad_() for i in range(3))
    counts = []
    for causal in (False, True):
        plan, traffic = TilePlan(T, T, tile, causal), Traffic()
        out = flash_attention(q, k, v, causal=causal, tile=tile,
                              traffic=traffic)
        forward = traffic.total
        out.sum().backward()
        counts.append(traffic.total - forward)
        pairs = sum(len(p) for _, p in plan.pairs())
        assert traffic.reads["dq"] == pairs * tile[0] * K
        assert sum(len(p) for _, p in plan.pairs(by_keys=True)) == pairs
    assert counts[0] == (2 * T * K + T) + 4 * T * K + 4 * (4 * T * K + 2 * T)
    assert counts[1] < 0.8 * counts[0]


def test_a_mask_skips_what_nobody_sees():
    x = [randn(64, 4, seed=i) for i in range(3)]
    band = causal_mask(64) & ~causal_mask(64).tril(-8)
    traffic = Traffic()
    out = flash_attention(*x, band, tile=(8, 8), traffic=traffic)
    assert_close(out, attention(*x, band), **TIGHT)
    assert traffic.reads["k"] == (2 * 8 - 1) * 8 * 4


@settings(max_examples=40)
@given(capacity=st.integers(100, 5000), K=st.integers(1, 8),
       key_tile=st.integers(1, 20))
def test_the_tallest_tile_fits_and_a_taller_one_does_not(
    capacity, K, key_tile
):
    try:
        rows, cols = tile_that_fits(capacity, K, key_tile)
    except ValueError as error:
        needed = 2 * K * key_tile + 2 * K + 2 + key_tile
        assert needed > capacity and f"at least {needed}" in str(error)
        return
    x = [torch.zeros(rows + 1, K), *torch.zeros(2, cols, K)]
    flash_attention(*x, tile=(rows, cols), traffic=Traffic(capacity))
    with pytest.raises(ValueError, match="use smaller tiles"):
        flash_attention(*x, tile=(rows + 1, cols), traffic=Traffic(capacity))


def test_the_last_tile_may_be_smaller():
    assert TilePlan(5, 4, (3, 4)).pairs() == [
        (slice(0, 3), [slice(0, 4)]), (slice(3, 5), [slice(0, 4)])]
    assert TilePlan(0, 3, (3, 9)).pairs() == []
    assert TilePlan(3, 0, (9, 9)).pairs() == [(slice(0, 3), [])]


@pytest.mark.parametrize(
    ("kwargs", "part"),
    [
        ({"k": torch.zeros(4, 5)}, "(4, 5)"),
        ({"v": torch.zeros(5, 3)}, "(5, 3)"),
        ({"q": torch.zeros(3)}, "(3,)"),
        ({"k": torch.zeros(4, 3).double()}, "float64"),
        ({n: torch.zeros(4, 3).long() for n in "qkv"}, "int64"),
        ({"tile": (0, 4)}, "at least 1"),
        ({"tile": (4,)}, "two sizes"),
        ({"tile": 4}, "two sizes"),
        ({"tile": (2.0, 2)}, "two sizes"),
        ({"q": torch.zeros(2, 4, 3), "k": torch.zeros(3, 4, 3)}, "broadcast"),
        ({"mask": torch.ones(4, 4)}, "torch.bool"),
        ({"mask": torch.ones(3, 4, dtype=torch.bool)}, "(3, 4)"),
        ({"k": torch.zeros(3, 3), "v": torch.zeros(3, 3), "causal": True},
         "S=3"),
    ],
)
def test_bad_input_is_refused(kwargs, part):
    given = {n: torch.zeros(4, 3) for n in "qkv"} | kwargs
    with pytest.raises(ValueError) as error:
        flash_attention(**given)
    assert part in str(error.value)


@pytest.mark.parametrize("call, part", [
    (lambda: flash_traffic(-1, 4, 2, (2, 2)), "T=-1"),
    (lambda: flash_traffic(4, 4.0, 2, (2, 2)), "S=4.0"),
    (lambda: flash_traffic(4, 4, 0, (2, 2)), "K=0"),
    (lambda: flash_traffic(4, 4, 2, (0, 2)), "two sizes"),
    (lambda: flash_traffic(4, 4, 2, 2), "two sizes"),
    (lambda: flash_traffic(4, 3, 2, (2, 2), causal=True), "S >= T"),
    (lambda: tile_that_fits(-5, 2), "capacity=-5"),
    (lambda: tile_that_fits(1e3, 2), "capacity=1000.0"),
    (lambda: tile_that_fits(1000, 0), "K=0"),
    (lambda: tile_that_fits(1000, 2, 0), "key_tile=0"),
    (lambda: tile_that_fits(10, 2), "holds no tile"),
])
def test_sizes_that_cannot_be(call, part):
    with pytest.raises(ValueError) as error:
        call()
    assert part in str(error.value)
    assert flash_traffic(0, 4, 2, (2, 2)) == 0  # no query: nothing moves


def test_partial_is_what_it_says():
    s, v = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[1.0], [5.0]])
    part = attend_tile(s, v)
    assert isinstance(part, Partial)
    assert_close(part.top, torch.tensor([math.log(3)]))
    assert_close(part.total, torch.tensor([4 / 3]))
    out, lse = part.finish()
    assert_close(out, torch.tensor([[4.0]]))  # (1 + 3 * 5) / 4
    assert_close(lse, torch.tensor([math.log(4)]))
