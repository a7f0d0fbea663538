"""A cached pass equals one without a cache, however the text is cut."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from minillm.attention import MultiHeadAttention, causal_mask, reachability
from minillm.kvcache import (
    EMPTY,
    CausalSelfAttention,
    KVCache,
    Linear,
    attend,
    held_positions,
    kv_cache_bytes,
    plan_pass,
    pool_kv_heads,
    slot_of,
    visible,
)
from minillm.positions import rope_frequencies, rope_tables
from minillm.transformer import GPT, GPTConfig

L, V = 24, 37  # tokens of a text, vocabulary


@st.composite
def configs(draw):
    """Configs of every kind of position, head, window and norm."""
    window = draw(st.sampled_from([None, 1, 3, 5, 40]))
    return GPTConfig(
        vocab_size=V, context_length=L, d_model=16, n_layers=2, n_heads=4,
        n_kv_heads=draw(st.sampled_from([4, 2, 1])),
        positions=draw(st.sampled_from(
            ["none", "sinusoidal", "learned", "alibi", "rope"])),
        norm=draw(st.sampled_from(["layer", "rms"])),
        norm_position=draw(st.sampled_from(["pre", "post"])),
        activation=draw(st.sampled_from(["gelu", "swiglu"])),
        qk_norm=draw(st.booleans()), bias=draw(st.booleans()),
        sliding_window=window,
        n_sinks=draw(st.integers(0, 3)) if window else 0,
    )


def build(cfg, dtype=torch.float32, seed=1):
    """Make a model whose attention is far from uniform, and a batch."""
    model = GPT(cfg, seed=seed).eval().to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 and "emb" not in name:
                p.mul_(8)
            elif p.ndim == 2:
                p.mul_(30)
    g = torch.Generator().manual_seed(seed)
    return model, torch.randint(0, V, (3, L), generator=g)


def tiny(**changes):
    fields = {"vocab_size": V, "context_length": L, "d_model": 16,
              "n_layers": 2, "n_heads": 4, "positions": "rope"}
    return GPTConfig(**(fields | changes))


def in_pieces(model, tokens, sizes, cache=None):
    """Run the model over pieces of the tokens; return all logits."""
    cache = cache or model.new_cache(len(tokens))
    with torch.no_grad():
        return torch.cat([model(t, cache) for t in tokens.split(sizes, 1)], 1)


def no_cache(model, tokens):
    with torch.no_grad():
        return model(tokens)


def cuts(draw, n=L):
    """Cut a text of n tokens at random."""
    at = sorted(draw(st.sets(st.integers(1, n), max_size=n)) - {n})
    return [b - a for a, b in zip([0, *at], [*at, n])]


@given(st.data(), configs(), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=120)
def test_any_split_of_the_prompt_gives_the_same_logits(data, cfg, dtype):
    model, tokens = build(cfg, dtype)
    expected = no_cache(model, tokens)
    assert expected.std() > 0.1  # logits that could differ
    got = in_pieces(model, tokens, cuts(data.draw))
    tight = 1e-4 if dtype == torch.float32 else 1e-11
    assert_close(got, expected, rtol=tight, atol=tight)


@given(st.data(), configs())
@settings(max_examples=120)
def test_ragged_batches_give_the_same_logits(data, cfg):
    model, tokens = build(cfg)
    expected, cache = no_cache(model, tokens), model.new_cache(3)
    at, rows = [0, 0, 0], [0, 1, 2]
    while min(at[r] for r in rows) < L:
        T = data.draw(st.integers(1, 9))
        n_new = [data.draw(st.integers(0, min(T, L - at[r]))) for r in rows]
        if not any(n_new):
            n_new = [min(T, L - at[r]) for r in rows]
        padded = torch.full((len(rows), T), V - 1)
        for i, r in enumerate(rows):
            padded[i, :n_new[i]] = tokens[r, at[r]:at[r] + n_new[i]]
        with torch.no_grad():
            got = model(padded, cache, n_new)
        assert not got.isnan().any()
        for i, r in enumerate(rows):
            want = expected[r, at[r]:at[r] + n_new[i]]
            assert_close(got[i, :n_new[i]], want, rtol=1e-4, atol=1e-4)
            at[r] += n_new[i]
        assert cache.lengths == [at[r] for r in rows]
        if data.draw(st.booleans()):  # drop who is done, shuffle the rest
            keep = [i for i, r in enumerate(rows) if at[r] < L]
            keep = data.draw(st.permutations(keep))
            if keep:
                cache.select(torch.tensor(keep))
                rows = [rows[i] for i in keep]


@given(st.data(), configs())
@settings(max_examples=60)
def test_a_failed_pass_does_not_count(data, cfg):
    model, tokens = build(cfg)
    expected, cache, start = no_cache(model, tokens), model.new_cache(3), 0
    for size in cuts(data.draw):
        if data.draw(st.booleans()):  # other tokens, and it fails half-way
            T = data.draw(st.integers(1, L - start))
            step = cache.begin(T)
            junk = torch.full((3, cfg.n_kv_heads, T, cfg.head_dim), 9.0)
            cache.remember(0, junk, junk)
            assert step.n_new == (T,) * 3 and cache.lengths == [start] * 3
        with torch.no_grad():
            got = model(tokens[:, start:start + size], cache)
        want = expected[:, start:start + size]
        assert_close(got, want, rtol=1e-4, atol=1e-4)
        start += size


@given(st.data(), configs())
@settings(max_examples=60)
def test_rewind_to_a_prefix(data, cfg):
    model, tokens = build(cfg)
    expected, cache = no_cache(model, tokens), model.new_cache(3)
    n = data.draw(st.integers(1, L - 1))
    keep = data.draw(st.integers(0, n))
    first = tokens.clone()
    first[:, keep:] = (first[:, keep:] + 1) % V  # a continuation to forget
    in_pieces(model, first[:, :n], cuts(data.draw, n), cache)
    if n > cache.n_slots and 0 < keep < n:
        with pytest.raises(ValueError, match="overwritten"):
            cache.rewind(keep)
        keep = 0
    with pytest.raises(ValueError, match="length="):
        cache.rewind(float(keep))
    cache.rewind(keep)
    assert cache.lengths == [keep] * 3
    with torch.no_grad():
        got = model(tokens[:, keep:], cache)
    assert_close(got, expected[:, keep:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window, n_sinks", [(None, 0), (6, 0), (6, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_greedy_tokens_are_identical(window, n_sinks, dtype):
    model, tokens = build(tiny(n_kv_heads=2, sliding_window=window,
                               n_sinks=n_sinks), dtype)
    plain, cache = tokens[:, :5], model.new_cache(3)
    cached, new = plain, plain
    with torch.no_grad():
        for _ in range(L - 5):
            best = model(plain)[:, -1].argmax(-1, keepdim=True)
            plain = torch.cat((plain, best), 1)
            new = model(new, cache)[:, -1].argmax(-1, keepdim=True)
            cached = torch.cat((cached, new), 1)
    assert torch.equal(plain, cached)


@pytest.mark.parametrize("window", [None, 5])
def test_bfloat16_is_as_good_with_a_cache_as_without(window):
    model, tokens = build(tiny(sliding_window=window))
    exact = no_cache(model, tokens)
    model.bfloat16()
    plain = no_cache(model, tokens).float()
    cached = in_pieces(model, tokens, [7, 1, 9, 1, 1, 5]).float()
    assert model.new_cache().keys.dtype == torch.bfloat16
    error = (plain - exact).abs().mean()
    assert (cached - exact).abs().mean() < 1.5 * error + 1e-3


def test_a_cache_may_be_narrower_than_the_model():
    model, tokens = build(tiny())
    cache = model.new_cache(3, dtype=torch.bfloat16)
    got = in_pieces(model, tokens, [10, 1, 1, 12], cache)
    assert got.dtype == torch.float32
    exact = no_cache(model, tokens)
    assert_close(got[:, :10], exact[:, :10])  # fresh: nothing was rounded
    assert 0 < (got - exact).abs().mean() < 0.1 * exact.std()


def test_qk_norm_under_autocast_is_silent():
    model = GPT(GPTConfig(50, 24, 32, 2, 4, qk_norm=True), seed=0)
    tokens = torch.randint(50, (2, 24))
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("error")
        loss = model(tokens).float().logsumexp(-1).mean()
        loss.backward()
    assert model.blocks[0].attn.q_norm.weight.grad.isfinite().all()


def test_autocast_with_a_cache():
    model, tokens = build(tiny())
    with torch.autocast("cpu", torch.bfloat16):
        plain = no_cache(model, tokens).float()
        cached = in_pieces(model, tokens, [7, 1, 16]).float()
    exact = no_cache(model, tokens)
    error = (plain - exact).abs().mean()
    assert (cached - exact).abs().mean() < 1.5 * error + 1e-3


def test_empty_rows_do_no_harm():
    model, tokens = build(tiny(n_kv_heads=1, positions="alibi"))
    expected, cache = no_cache(model, tokens), model.new_cache(3)
    with torch.no_grad():
        model(tokens[:, :4], cache, [4, 0, 2])
        got = model(tokens[:, 4:5], cache, [1, 0, 0])
        assert_close(got[0], expected[0, 4:5], rtol=1e-4, atol=1e-4)
        assert not got.isnan().any() and cache.lengths == [5, 0, 2]
        assert not model(tokens[:, :3], cache, [0, 0, 0]).isnan().any()
        got = model(tokens[:, :6], cache, [0, 6, 0])
    assert_close(got[1], expected[1, :6], rtol=1e-4, atol=1e-4)
    assert cache.lengths == [5, 6, 2]


def test_rows_do_not_see_each_other():
    model, tokens = build(tiny())
    other = tokens.clone()
    other[1] = (other[1] + 1) % V
    got, moved = (
        in_pieces(model, t, [9, 1, 14]) for t in (tokens, other))
    assert_close(got[[0, 2]], moved[[0, 2]])
    assert (got[1] != moved[1]).any()


# -- bytes, work, launches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window, n_sinks, n_slots",
                         [(None, 0, 24), (6, 0, 6), (6, 2, 8), (30, 2, 24)])
def test_bytes_as_predicted(window, n_sinks, n_slots, dtype):
    cfg = tiny(n_kv_heads=2, sliding_window=window, n_sinks=n_sinks)
    cache = GPT(cfg, seed=0).new_cache(3, dtype=dtype)
    storage = (cache.keys.untyped_storage().nbytes()
               + cache.values.untyped_storage().nbytes())
    predicted = kv_cache_bytes(2, 2, 4, n_slots, 3, dtype)
    assert cache.n_slots == n_slots
    assert cache.n_bytes == storage == predicted
    cache.select(torch.tensor([True, False, True]))
    assert cache.n_bytes == predicted * 2 // 3


def count_ops(fn):
    """Count the operators that reach the backend, views left out."""
    from torch.utils._python_dispatch import TorchDispatchMode

    views = ("view", "slice", "select", "transpose", "expand", "unsqueeze",
             "squeeze", "t.", "split", "detach", "alias", "as_strided",
             "unfold", "permute")

    class Count(TorchDispatchMode):
        names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = str(func).removeprefix("aten.")
            if not name.startswith(views):
                self.names.append(name)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Count() as count:
        count.names.clear()
        fn()
    return count.names


@pytest.mark.parametrize("window", [None, 6])
def test_one_token_launches_little(window):
    model, tokens = build(tiny(sliding_window=window))
    cache = model.new_cache(1)
    in_pieces(model, tokens[:1, :4], [4], cache)
    begin = count_ops(lambda: cache.begin(1))
    assert len(begin) <= 2, begin  # two ranges, before the ring turns
    k = torch.zeros(1, 4, 1, 4)
    assert len(count_ops(lambda: cache.remember(0, k, k))) == 2
    in_pieces(model, tokens[:1, 4:12], [8], cache)
    assert len(count_ops(lambda: cache.begin(1))) <= 16


def test_no_mask_where_none_is_needed():
    cache = KVCache(1, 2, 1, 20, 4, window=6, n_sinks=2)
    k = torch.zeros(2, 1, 8, 4)

    def step(T, n_new=None):
        plan = cache.begin(T, n_new)
        cache.remember(0, k[:, :, :T], k[:, :, :T])
        cache.commit()
        return plan

    assert step(8, [8, 3]).mask is None  # right padding of a first pass
    assert step(1).mask.shape == (2, 1, 1, 8)  # 9 of row 0, turned; 4
    cache.rewind(0)
    assert step(8).mask is None
    assert step(1).mask is None and step(1).mask is None
    assert step(3).mask.shape == (3, 8 + 3)


def test_the_ring_holds_sinks_and_the_newest():
    for n_slots, n_sinks in ((5, 0), (5, 2), (1, 0), (3, 3), (4, 1)):
        if n_slots == n_sinks:
            continue
        held = [None] * n_slots
        for p in range(17):
            held[slot_of(p, n_slots, n_sinks)] = p
            got = held_positions(torch.tensor(p + 1), n_slots, n_sinks)
            assert got.tolist() == [EMPTY if h is None else h for h in held]
            newest = set(range(max(0, p + 1 - (n_slots - n_sinks)), p + 1))
            assert newest | set(range(min(p + 1, n_sinks))) == set(
                h for h in held if h is not None)


# -- errors


def test_errors_name_the_remedy():
    for sizes in ((0, 1, 1, 8, 4), (1, 1, 1, 0, 4)):
        with pytest.raises(ValueError, match="at least 1"):
            KVCache(*sizes)
    with pytest.raises(ValueError, match="window=None"):
        KVCache(1, 1, 1, 8, 4, window=0)
    for window, n_sinks in ((None, 2), (3, -1)):
        with pytest.raises(ValueError, match="n_sinks"):
            KVCache(1, 1, 1, 8, 4, window=window, n_sinks=n_sinks)
    cache, k = KVCache(1, 2, 1, 8, 4), torch.zeros(2, 1, 3, 4)
    with pytest.raises(ValueError, match="call begin"):
        cache.remember(0, k, k)
    with pytest.raises(ValueError, match="call begin"):
        cache.commit()
    for n_new in ([1], [4, 0], [-1, 2], [1, 2, 3]):
        with pytest.raises(ValueError, match="n_new"):
            cache.begin(3, n_new)
    with pytest.raises(ValueError, match="at least one"):
        cache.begin(0)
    with pytest.raises(ValueError, match="max_length=8"):
        cache.begin(9)
    cache.begin(12, [8, 0])  # padding may stick out
    cache.begin(3)
    for wrong in (k[:1], k[:, :, :2], k[..., :2], k.expand(2, 2, 3, 4)):
        with pytest.raises(ValueError, match="shape"):
            cache.remember(0, wrong, wrong)
    with pytest.raises(ValueError, match="no_grad"):
        cache.remember(0, k.clone().requires_grad_(), k)
    cache.remember(0, k, k)
    cache.commit()
    for rows in ([False, False], [True], [2], [], [[0], [1]], [0.0], 0):
        for wrong in (rows, torch.tensor(rows)):
            with pytest.raises(ValueError, match="select none"):
                cache.select(wrong)
    for wrong in (None, "0", ["a"], [[0], [1, 0]]):
        with pytest.raises(ValueError, match="select none"):
            cache.select(wrong)
    for length in (-1, 4):
        with pytest.raises(ValueError, match="rewind to 0"):
            cache.rewind(length)
    assert cache.lengths == [3, 3]
    ring = KVCache(1, 1, 1, 8, 4, window=2)
    ring.begin(3)
    ring.remember(0, k[:1], k[:1])
    ring.commit()
    with pytest.raises(ValueError, match="length=2.*2 slots.*without a win"):
        ring.rewind(2)


def test_rows_are_chosen_by_a_list_too():
    for rows, lengths in (([2, 0, 0], [3, 1, 1]),
                          ([True, False, True], [1, 3])):
        caches = [KVCache(1, 3, 1, 4, 2) for _ in range(2)]
        for cache in caches:
            cache.keys.normal_(generator=torch.Generator().manual_seed(0))
            cache.lengths = [1, 2, 3]
        caches[0].select(rows)
        caches[1].select(torch.tensor(rows))
        assert torch.equal(caches[0].keys, caches[1].keys)
        assert caches[0].lengths == caches[1].lengths == lengths


def test_only_what_was_stored_turns_the_ring():
    ring, k = KVCache(1, 1, 1, 8, 4, window=2), torch.randn(1, 1, 1, 4)
    for _ in range(2):
        ring.begin(1)
        ring.remember(0, k, k)
        ring.commit()
    ring.begin(1)  # and the pass fails before anything is stored
    ring.rewind(1)
    assert ring.lengths == [1]
    ring.begin(1)
    ring.remember(0, k, k)
    ring.commit()
    ring.begin(1)
    ring.remember(0, k, k)  # over the first token; then the pass fails
    assert ring.lengths == [2]
    with pytest.raises(ValueError, match="2 slots"):
        ring.rewind(1)


def test_dropout_is_a_chance_below_one():
    for dropout in (1.0, -0.1, "0.1", float("nan")):
        with pytest.raises(ValueError, match="switches it off"):
            CausalSelfAttention(8, 2, dropout=dropout)


def test_outgrowing_leaves_the_cache_as_it_was():
    model, tokens = build(tiny())
    cache = model.new_cache(3, max_length=10)
    in_pieces(model, tokens[:, :8], [8], cache)
    with pytest.raises(ValueError, match="max_length=10"):
        model(tokens[:, 8:11], cache)
    assert cache.lengths == [8] * 3
    with torch.no_grad():
        got = model(tokens[:, 8:10], cache)
    assert_close(got, no_cache(model, tokens)[:, 8:10], rtol=1e-4, atol=1e-4)


def test_select_forks_a_prompt():
    model, tokens = build(tiny(sliding_window=5, n_sinks=1))
    same = tokens[:1].expand(3, L).clone()
    same[:, 9:] = tokens[:, 9:]
    cache = model.new_cache(1)
    in_pieces(model, same[:1, :9], [9], cache)
    cache.select(torch.tensor([0, 0, 0]))
    got = in_pieces(model, same[:, 9:], [1, 1, 13], cache)
    assert_close(got, no_cache(model, same)[:, 9:], rtol=1e-4, atol=1e-4)


# -- attend, heads, windows


def qkv(H=4, n_kv=2, T=5, S=5, dtype=torch.float64):
    return (torch.randn(2, H, T, 6, dtype=dtype),
            torch.randn(2, n_kv, S, 6, dtype=dtype),
            torch.randn(2, n_kv, S, 6, dtype=dtype))


@pytest.mark.parametrize("n_kv", [4, 2, 1])
@pytest.mark.parametrize("T, S", [(5, 5), (1, 5), (3, 5), (1, 1)])
def test_groups_equal_repeated_heads(n_kv, T, S):
    q, k, v = qkv(4, n_kv, T, S)
    many = [x.repeat_interleave(4 // n_kv, dim=1) for x in (k, v)]
    causal = causal_mask(T, S)
    bias = torch.randn(2, 4, T, S, dtype=q.dtype)
    per_row = causal & (torch.rand(2, 1, T, S) < 0.7)
    per_row[..., 0] = True
    for mask in (causal, bias, bias[0], per_row):
        want = F.scaled_dot_product_attention(q, *many, mask)
        assert_close(attend(q, k, v, mask), want)
    if T in (1, S):
        want = F.scaled_dot_product_attention(q, *many, causal)
        assert_close(attend(q, k, v), want)


@pytest.mark.parametrize("T, S", [(2, 5), (5, 2), (2, 1)])
def test_without_a_mask_the_shapes_must_agree(T, S):
    with pytest.raises(ValueError, match="visible"):
        attend(*qkv(T=T, S=S))


@pytest.mark.parametrize("n_kv", [4, 2, 1])
@pytest.mark.parametrize("T", [1, 4])
def test_gradients_of_attend(n_kv, T):
    q, k, v = (x.requires_grad_() for x in qkv(4, n_kv, T, 4))
    assert torch.autograd.gradcheck(attend, (q, k, v), fast_mode=True)


def test_visible_is_a_rule_on_positions():
    q, k = torch.randint(0, 12, (2, 7)), torch.randint(0, 12, (2, 9))
    k[0, 3] = EMPTY
    for window, n_sinks in ((None, 0), (3, 0), (3, 2), (1, 1)):
        got = visible(q, k, window, n_sinks)
        for b, t, s in torch.cartesian_prod(*map(torch.arange, got.shape)):
            i, j = q[b, t].item(), k[b, s].item()
            near = window is None or i - j < window or j < n_sinks
            assert got[b, t, s] == (j <= i and near)
    at = torch.arange(6)
    assert torch.equal(visible(at, at), causal_mask(6))
    assert torch.equal(visible(at[4:], at), causal_mask(2, 6))


@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_the_receptive_field_grows_by_a_window_a_layer(window, n_layers):
    model, tokens = build(tiny(sliding_window=window, n_layers=n_layers))
    other = (tokens[:1] + 1) % V
    reach = reachability(model.double(), tokens[:1], other)
    at = torch.arange(L)
    assert torch.equal(reach, visible(at, at, n_layers * (window - 1) + 1))


def test_equal_to_the_readable_module():
    ours = CausalSelfAttention(24, 4).double()
    theirs = MultiHeadAttention(24, 4).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    assert_close(ours(x), theirs(x, mask=causal_mask(7)))
    assert torch.autograd.gradcheck(
        ours, (x.requires_grad_(),), fast_mode=True)


def rotation(T, K, dtype=torch.float64):
    return rope_tables(torch.arange(T), rope_frequencies(K), dtype)


@pytest.mark.parametrize("n_kv", [4, 2, 1])
def test_grouped_queries_equal_repeated_weights(n_kv):
    few = CausalSelfAttention(24, 4, n_kv_heads=n_kv, qk_norm=True).double()
    many = CausalSelfAttention(24, 4, qk_norm=True).double()
    weights = few.state_dict()
    for name in ("k_proj.weight", "k_proj.bias", "v_proj.weight",
                 "v_proj.bias"):
        heads = weights[name].unflatten(0, (n_kv, 6))
        weights[name] = heads.repeat_interleave(4 // n_kv, 0).flatten(0, 1)
        assert_close(pool_kv_heads(weights[name], 4, n_kv),
                     few.state_dict()[name])
    many.load_state_dict(weights)
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    assert_close(few(x, rotation(7, 6)), many(x, rotation(7, 6)))


def test_pooling_is_a_mean_over_each_group():
    weight = torch.randn(8 * 3, 5)
    pooled = pool_kv_heads(weight, 8, 2)
    assert_close(pooled[:3], torch.stack(weight[:12].split(3)).mean(0))
    assert_close(pool_kv_heads(weight, 8, 8), weight)
    for n_heads, n_kv in ((8, 3), (8, 0), (7, 7), (8, 16)):
        with pytest.raises(ValueError, match="n_kv_heads"):
            pool_kv_heads(weight, n_heads, n_kv)


def test_qk_norm_bounds_the_scores():
    x = torch.randn(1, 9, 24)
    seen = []
    for scale in (1.0, 100.0):
        layer = CausalSelfAttention(24, 2, qk_norm=True, norm_eps=1e-12)
        with torch.no_grad():
            layer.q_proj.weight.mul_(scale)
            layer.k_proj.weight.mul_(scale)

        def remember(k, v):
            seen.append(k)
            return k, v

        layer(x, rotation(9, 12, torch.float32), remember=remember)
        assert_close(seen[-1].norm(dim=-1), torch.full((1, 2, 9),
                                                       math.sqrt(12)))
    with pytest.raises(ValueError, match="divisor"):
        CausalSelfAttention(24, 4, n_kv_heads=3)
    with pytest.raises(ValueError, match="divisors"):
        CausalSelfAttention(24, 5)


# -- Linear


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32,
                                   torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(12,), (1, 12), (1, 1, 12), (2, 3, 12),
                                   (0, 12)])
def test_linear_equals_torch(dtype, bias, shape):
    ours = Linear(12, 7, bias=bias, dtype=dtype)
    theirs = nn.Linear(12, 7, bias=bias, dtype=dtype)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(shape, dtype=dtype)
    with torch.no_grad():
        got, want = ours(x), theirs(x)
    assert got.shape == want.shape and got.dtype == want.dtype
    assert_close(got, want)
    x.requires_grad_()
    ours(x).sum().backward()
    assert x.grad.shape == x.shape


def test_linear_under_autocast_and_with_a_wrong_dtype():
    layer = Linear(12, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(1, 12)).dtype == torch.bfloat16
    with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
        layer(torch.randn(1, 12, dtype=torch.float64))
    with torch.no_grad(), pytest.raises(RuntimeError):
        layer(torch.randn(4, 3))  # 12 numbers, and yet not one row


def test_known_sizes():
    """Llama 3 8B: 128 KiB a token; without groups four times as much."""
    assert kv_cache_bytes(32, 8, 128, 1, dtype=torch.bfloat16) == 128 * 1024
    assert kv_cache_bytes(32, 32, 128, 1, dtype=torch.bfloat16) == 512 * 1024


@given(st.data())
@settings(max_examples=200)
def test_a_plan_offers_what_the_ring_holds(data):
    """Positions and mask against a list that is kept slot by slot."""
    window = data.draw(st.sampled_from([None, 1, 3, 6]))
    n_sinks = data.draw(st.integers(0, 2)) if window else 0
    n_slots = 30 if window is None else min(30, window + n_sinks)
    B, lengths = data.draw(st.integers(1, 3)), None
    lengths = [0] * B
    slots = [[None] * n_slots for _ in range(B)]
    for _ in range(4):
        T = data.draw(st.integers(1, 7))
        n_new = [data.draw(st.integers(0, T)) for _ in range(B)]
        plan = plan_pass(lengths, T, n_new, n_slots, window, n_sinks)
        ends = [a + n for a, n in zip(lengths, n_new)]
        after = [list(row) for row in slots]
        for b, (start, end) in enumerate(zip(lengths, ends)):
            for p in range(start, end):
                after[b][slot_of(p, n_slots, n_sinks)] = p
        S = plan.key_positions.shape[-1]
        keys = plan.key_positions.expand(B, S).tolist()
        queries = plan.positions.expand(B, T).tolist()
        mask = plan.mask
        if mask is None:
            mask = causal_mask(T, S) if T > 1 else torch.ones(1, S) > 0
        mask = (mask[:, 0] if mask.ndim == 4 else mask).expand(B, T, S)
        for b in range(B):
            new = list(range(lengths[b], lengths[b] + T))
            offered = {"new": new, "slots": after[b],
                       "both": slots[b] + new}[plan.offers]
            for t in range(n_new[b]):  # padding may see what it likes
                seen = sorted(k for k, s in zip(keys[b], mask[b, t]) if s)
                q = queries[b][t]
                want = [j for j in range(q + 1) if window is None
                        or q - j < window or j < n_sinks]
                assert seen == want and set(want) <= set(offered)
                for s in range(S):  # the key there is what it is said to be
                    if mask[b, t, s]:
                        assert offered[s] == keys[b][s]
        if plan.places is not None:
            for row, column, slot in plan.places.T.tolist():
                assert after[row][slot] == lengths[row] + column
        lengths, slots = ends, after


def test_a_pass_of_padding_alone_overwrites_nothing():
    model, tokens = build(tiny(sliding_window=6))
    cache, expected = model.new_cache(3), no_cache(model, tokens)
    in_pieces(model, tokens[:, :6], [6], cache)
    with torch.no_grad():
        model(tokens[:, :1], cache, [0, 0, 0])
        cache.rewind(4)  # nothing has been lost
        got = model(tokens[:, 4:], cache)
    assert_close(got, expected[:, 4:], rtol=1e-4, atol=1e-4)


def test_rewind_to_the_start_forgets_that_the_ring_turned():
    model, tokens = build(tiny(sliding_window=6))
    cache = model.new_cache(3)
    in_pieces(model, tokens[:, :9], [9], cache)
    cache.rewind(0)
    in_pieces(model, tokens[:, :5], [5], cache)
    cache.rewind(2)
    with torch.no_grad():
        got = model(tokens[:, 2:], cache)
    assert_close(got, no_cache(model, tokens)[:, 2:], rtol=1e-4, atol=1e-4)
