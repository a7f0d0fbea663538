"""The model's parts fit together; its counts, errors and causality hold."""

import dataclasses
import json
import math
import pickle
from copy import deepcopy
from typing import get_args, get_origin

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import EXACT
from torch import nn
from torch.testing import assert_close

from minillm.attention import causal_mask, reachability
from minillm.kvcache import visible
from minillm.layers import LayerNorm, RMSNorm
from minillm.transformer import (
    GPT,
    GPTConfig,
    TransformerBlock,
    cache_sizes,
    check_cache,
    check_field,
    count_parameters,
    default_d_ff,
    find_places,
    init_weights,
    preset_fields,
    tell_places,
    tied_names,
)

TIGHT = {"rtol": 1e-10, "atol": 1e-12}
SWITCHES = [
    {}, {"norm_position": "post"}, {"norm": "rms"}, {"bias": False},
    {"activation": "relu"}, {"activation": "silu"},
    {"activation": "gelu_tanh"}, {"activation": "swiglu"},
    {"tie_weights": False}, {"n_heads": 1}, {"n_kv_heads": 2},
    {"n_kv_heads": 1}, {"qk_norm": True}, {"positions": "none"},
    {"positions": "sinusoidal"}, {"positions": "alibi"},
    {"positions": "rope"}, {"positions": "rope", "rope_theta": 100},
    {"positions": "rope",
     "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"d_ff": 7}, {"norm": "rms", "norm_position": "post", "bias": False},
    {"norm": "rms", "positions": "rope", "activation": "swiglu",
     "n_kv_heads": 2, "bias": False, "qk_norm": True, "tie_weights": False},
]
WINDOWS = [
    {"sliding_window": 3}, {"sliding_window": 1},
    {"sliding_window": 100},  # wider than the context: the whole past
    {"sliding_window": 3, "n_sinks": 2},
    {"sliding_window": 4, "n_sinks": 1, "positions": "rope"},
    {"sliding_window": 3, "n_sinks": 1, "positions": "alibi"},
]


def tiny(**changes):
    fields = {"vocab_size": 37, "context_length": 12, "d_model": 24,
              "n_layers": 3, "n_heads": 4}
    return GPTConfig(**(fields | changes))


def ids(B=2, T=9, V=37, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(V, (B, T), generator=g)


# The block


@pytest.mark.parametrize("position", ["pre", "post"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_block_is_its_formula(position, norm):
    block = TransformerBlock(tiny(norm_position=position, norm=norm)).double()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    if position == "pre":
        y = x + block.attn(block.attn_norm(x))
        wanted = y + block.ffn(block.ffn_norm(y))
    else:
        y = block.attn_norm(x + block.attn(x))
        wanted = block.ffn_norm(y + block.ffn(y))
    assert_close(block(x), wanted)
    kind = {"layer": LayerNorm, "rms": RMSNorm}[norm]
    assert type(block.attn_norm) is type(block.ffn_norm) is kind


def test_block_without_writers_is_the_identity():
    block = TransformerBlock(tiny())
    for part in (block.attn.o_proj, block.ffn.down_proj):
        nn.init.zeros_(part.weight)
        nn.init.zeros_(part.bias)
    x = torch.randn(2, 5, 24)
    assert torch.equal(block(x), x)


def test_residual_stream_is_the_sum_of_all_writes():
    model, writes, seen = GPT(tiny(), seed=0).double(), [], []
    for block in model.blocks:
        for part in (block.attn, block.ffn):
            part.register_forward_hook(lambda m, i, out: writes.append(out))
    model.norm.register_forward_pre_hook(lambda m, i: seen.append(i[0]))
    x = ids()
    model(x)
    start = model.tok_emb(x) + model.pos_emb.weight[:9]
    assert_close(model.embed(x), start, **TIGHT)
    assert_close(seen[0], start + sum(writes), **TIGHT)


def test_block_gradients_in_float64():
    block = TransformerBlock(tiny(d_model=8, n_heads=2)).double()
    x = torch.randn(1, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, (x,))


# Counts


@pytest.mark.parametrize("name", list(preset_fields()))
def test_counts_of_presets(name):
    cfg = GPTConfig.preset(name)
    with torch.device("meta"):
        model = GPT(cfg, seed=0)
    assert model.tok_emb.weight.is_meta
    assert count_parameters(model) == count_parameters(cfg)
    assert count_parameters(cfg) == EXACT.get(name, count_parameters(model))


def test_count_of_llama_tiny_by_hand():
    D, d_ff, kv = 128, 352, 64
    attention = 2 * D * D + 2 * D * kv
    block = attention + 3 * D * d_ff + 2 * D
    cfg = GPTConfig.preset("llama-tiny")
    assert count_parameters(cfg) == 2048 * D + 4 * block + D


@pytest.mark.parametrize("changes", SWITCHES + WINDOWS)
def test_counts_by_formula_for_every_option(changes):
    cfg = tiny(**changes)
    assert count_parameters(cfg) == count_parameters(GPT(cfg))


@settings(max_examples=40)
@given(
    st.integers(1, 50), st.integers(1, 9), st.integers(1, 3),
    st.sampled_from([(1, 1, 6), (4, 2, 16), (6, 3, 24), (4, 4, 8)]),
    st.booleans(), st.booleans(), st.booleans(),
    st.sampled_from(["layer", "rms"]), st.sampled_from(["pre", "post"]),
    st.sampled_from(["none", "sinusoidal", "learned", "alibi", "rope"]),
    st.sampled_from(["gelu", "swiglu"]), st.integers(1, 40) | st.none(),
)
def test_counts_of_any_config(V, C, n, heads, bias, tie, qk, norm, place,
                              positions, activation, d_ff):
    H, kv, D = heads
    cfg = GPTConfig(
        V, C, D, n, H, kv, d_ff, bias=bias, tie_weights=tie, qk_norm=qk,
        norm=norm, norm_position=place, positions=positions,
        activation=activation)
    assert count_parameters(cfg) == count_parameters(GPT(cfg, seed=0))
    again = json.loads(json.dumps(dataclasses.asdict(cfg)))
    assert GPTConfig.from_dict(again) == cfg


# The model: causality, cache, gradients


@pytest.mark.parametrize("changes", SWITCHES)
def test_model_is_causal_with_finite_gradients(changes):
    model = GPT(tiny(**changes), seed=0)
    x = ids(1, 12)
    if changes.get("positions") == "sinusoidal":  # O(1) beside weights of 0.02
        model = model.double()
    assert torch.equal(reachability(model, x, (x + 1) % 37), causal_mask(12))
    F.cross_entropy(model(x)[0, :-1], x[0, 1:]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all()
               for p in model.parameters())


@pytest.mark.parametrize("changes", WINDOWS)
def test_windows_reach_further_with_each_layer(changes):
    cfg = tiny(**changes)
    model, x, place = GPT(cfg, seed=0).double(), ids(1, 12), torch.arange(12)
    layer = visible(place, place, cfg.sliding_window, cfg.n_sinks).int()
    reach = torch.matrix_power(layer, cfg.n_layers) > 0
    assert torch.equal(reachability(model, x, (x + 1) % 37), reach)


@pytest.mark.parametrize("changes", SWITCHES + WINDOWS)
def test_cached_equals_uncached(changes):
    model, x = GPT(tiny(**changes), seed=0).double().eval(), ids(2, 12)
    with torch.no_grad():
        full, cache = model(x), model.new_cache(2)
        parts = [model(part, cache) for part in x.split((5, 1, 4, 1, 1), 1)]
        assert_close(torch.cat(parts, 1), full, **TIGHT)
        assert cache.lengths == [12, 12]


def test_ragged_rows_equal_each_row_alone():
    model, x = GPT(tiny(), seed=0).double().eval(), ids(2, 12)
    with torch.no_grad():
        cache = model.new_cache(2)
        out = model(x[:, :7], cache, n_new=[7, 4])
        assert_close(out[1, :4], model(x[1:, :4])[0], **TIGHT)
        out = model(x[:, 7:9], cache, n_new=[2, 1])
        row = torch.cat((x[1, :4], x[1, 7:8]))[None]
        assert_close(out[1, 0], model(row)[0, -1], **TIGHT)
        assert_close(out[0], model(x[:1, :9])[0, -2:], **TIGHT)


def test_a_window_wider_than_the_context_changes_nothing():
    x = ids()
    wide, plain = GPT(tiny(sliding_window=99), seed=0), GPT(tiny(), seed=0)
    assert torch.equal(wide(x), plain(x))


def test_logits_do_not_depend_on_what_follows_or_on_the_batch():
    model, x = GPT(tiny(), seed=0).double(), ids(3, 12)
    full = model(x)
    assert_close(model(x[:, :5]), full[:, :5])
    assert_close(model(x[1:2]), full[1:2])
    assert full.shape == (3, 12, 37)


@pytest.mark.parametrize("shape", [(1, 1), (1, 12), (5, 1)])
@pytest.mark.parametrize("positions", ["learned", "rope", "alibi"])
def test_smallest_and_largest_inputs(shape, positions):
    model = GPT(tiny(positions=positions), seed=0)
    assert model(ids(*shape)).shape == (*shape, 37)
    one = GPT(tiny(vocab_size=1, context_length=1, positions=positions))
    assert one(torch.zeros(1, 1).long()).shape == (1, 1, 1)


def test_tell_places_gives_what_each_kind_needs():
    place = torch.arange(5)
    for kind in ("none", "learned", "sinusoidal"):
        told = tell_places(tiny(positions=kind), place, place, None,
                           torch.float32)
        assert told == (None, None)
    (cos, sin), mask = tell_places(
        tiny(positions="rope"), place, place, None, torch.bfloat16)
    assert cos.dtype is sin.dtype is torch.bfloat16 and mask is None
    assert cos.shape == (5, 3) and cos[0].eq(1).all() and sin[0].eq(0).all()
    _, bias = tell_places(
        tiny(positions="alibi"), place, place, None, torch.float64)
    assert bias.dtype is torch.float64 and bias.shape == (1, 4, 5, 5)
    assert torch.equal(bias[0, 0].isfinite(), causal_mask(5))
    assert bias.diagonal(dim1=2, dim2=3).eq(0).all()
    rows = torch.stack((place, place + 1))  # rows of different lengths
    _, bias = tell_places(
        tiny(positions="alibi"), rows, rows, None, torch.float32)
    assert bias.shape == (2, 4, 5, 5)


@pytest.mark.parametrize("n_kv_heads", [4, 2])
@pytest.mark.parametrize("changes", [
    {"positions": "alibi"}, {"positions": "alibi", "sliding_window": 5},
    {"sliding_window": 5}, {"positions": "rope"}])
def test_every_kind_of_places_takes_the_fused_attention(changes, n_kv_heads):
    from torch.profiler import ProfilerActivity, profile

    model = GPT(tiny(n_kv_heads=n_kv_heads, **changes), seed=0).eval()
    x = ids()
    for cache in (None, model.new_cache(2)):
        with torch.no_grad(), profile(
                activities=[ProfilerActivity.CPU]) as seen:
            model(x, cache)
        counts = {e.key: e.count for e in seen.key_averages()}
        fused = "aten::_scaled_dot_product_flash_attention_for_cpu"
        assert counts.get(fused) == 3
        assert "aten::_scaled_dot_product_attention_math" not in counts


def test_find_places_says_who_sees_whom():
    x = ids(2, 9)
    for cfg in (tiny(), tiny(sliding_window=9)):
        places, keys, mask = find_places(cfg, x)
        assert torch.equal(places, torch.arange(9)) and mask is None
        assert torch.equal(keys, places)
    window = {"sliding_window": 3, "n_sinks": 1}
    places, keys, mask = find_places(tiny(**window), x)
    assert torch.equal(mask, visible(places, keys, 3, 1))
    cache = GPT(tiny()).new_cache(2)
    places, keys, mask = find_places(tiny(), x, cache, [9, 4])
    assert cache.step is not None and len(places) == 9
    with pytest.raises(ValueError, match="pass cache="):
        find_places(tiny(), x, None, [9, 4])


def test_cache_sizes():
    assert cache_sizes(tiny(n_kv_heads=2), 5, None) == (3, 5, 2, 12, 6)
    assert cache_sizes(tiny(positions="rope"), 1, 99)[3] == 99
    with pytest.raises(ValueError, match="max_length=13.*12"):
        cache_sizes(tiny(), 1, 13)


def test_forward_copies_no_activation():
    from torch.profiler import ProfilerActivity, profile

    model, x = GPT(tiny(bias=False), seed=0).eval(), ids()
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as seen:
        model(x)
    counts = {e.key: e.count for e in seen.key_averages()}
    copies = ("aten::clone", "aten::contiguous", "aten::copy_", "aten::cat")
    assert not [name for name in copies if counts.get(name)]


# Tied weights


def test_tied_weights_are_one_tensor_and_stay_one():
    model = GPT(tiny(), seed=0)
    assert model.lm_head.weight is model.tok_emb.weight
    model.double()
    model.load_state_dict(GPT(tiny(), seed=1).double().state_dict())
    assert model.lm_head.weight is model.tok_emb.weight
    for twin in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.lm_head.weight is twin.tok_emb.weight
        assert twin.tok_emb.weight is not model.tok_emb.weight
    untied = GPT(tiny(tie_weights=False), seed=0)
    assert untied.lm_head.weight is not untied.tok_emb.weight
    untied.tie()
    assert untied.lm_head.weight is not untied.tok_emb.weight


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("missing", [None, "tok_emb", "lm_head"])
def test_loading_keeps_the_tie(assign, missing):
    source = GPT(tiny(), seed=1)
    weights = {k: v.clone() for k, v in source.state_dict().items()
               if k != f"{missing}.weight"}
    model = GPT(tiny(), seed=0)
    result = model.load_state_dict(weights, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    assert model.lm_head.weight is model.tok_emb.weight
    assert count_parameters(model) == count_parameters(tiny())
    assert torch.equal(model(ids()), source(ids()))
    assert f"{missing}.weight" not in weights  # the caller's dict is as it was


def test_loading_two_matrices_into_a_tied_model_is_refused():
    two = GPT(tiny(tie_weights=False), seed=0).state_dict()
    model = GPT(tiny(), seed=1)
    before = model.tok_emb.weight.clone()
    with pytest.raises(ValueError, match="tie_weights=False"):
        model.load_state_dict(two)
    assert torch.equal(model.tok_emb.weight, before)
    with pytest.raises(ValueError, match="differ"):
        tied_names(model, {"tok_emb.weight": torch.ones(2, 3),
                           "lm_head.weight": torch.ones(3, 2)})
    del two["lm_head.weight"]
    with pytest.raises(RuntimeError, match="lm_head"):  # torch's own
        GPT(tiny(tie_weights=False)).load_state_dict(two)
    nothing = {}
    tied_names(model, nothing)
    assert nothing == {}


@pytest.mark.parametrize("assign", [False, True])
def test_the_tie_holds_inside_another_module(assign):
    source, outer = GPT(tiny(), seed=1), nn.Sequential(GPT(tiny(), seed=0))
    weights = {f"0.{k}": v.clone() for k, v in source.state_dict().items()}
    del weights["0.lm_head.weight"]
    result = outer.load_state_dict(weights, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    assert outer[0].lm_head.weight is outer[0].tok_emb.weight
    assert torch.equal(outer(ids()), source(ids()))
    weights["0.lm_head.weight"] = weights["0.tok_emb.weight"] + 1
    with pytest.raises(ValueError, match="0.lm_head.weight differ"):
        outer.load_state_dict(weights)


def test_an_untied_model_loads_a_tied_one():
    tied, untied = GPT(tiny(), seed=1), GPT(tiny(tie_weights=False), seed=0)
    untied.load_state_dict(tied.state_dict())
    assert untied.lm_head.weight is not untied.tok_emb.weight
    assert torch.equal(tied(ids()), untied(ids()))


def test_gradient_of_the_shared_matrix_is_the_sum_of_both_uses():
    tied = GPT(tiny(), seed=0).double()
    apart = GPT(tiny(tie_weights=False), seed=0).double()
    apart.load_state_dict(tied.state_dict())
    x = ids()
    for model in (tied, apart):
        F.cross_entropy(model(x)[:, :-1].flatten(0, 1),
                        x[:, 1:].flatten()).backward()
    assert_close(tied.tok_emb.weight.grad,
                 apart.tok_emb.weight.grad + apart.lm_head.weight.grad)
    # the lookup alone reaches only the rows of ids that occurred
    unused = [i for i in range(37) if i not in x[:, :-1]]
    assert apart.tok_emb.weight.grad[unused].eq(0).all()
    assert tied.tok_emb.weight.grad[unused].ne(0).any(dim=1).all()


def test_material_from_the_meta_device_can_be_tied_again():
    with torch.device("meta"):
        model = GPT(tiny(), seed=0)
    model.to_empty(device="cpu")
    model.tie()
    init_weights(model, 0)
    assert model.lm_head.weight is model.tok_emb.weight
    assert torch.equal(model(ids()), GPT(tiny(), seed=0)(ids()))
    with torch.device("meta"):
        model = GPT(tiny())
    model.load_state_dict(GPT(tiny(), seed=0).state_dict(), assign=True)
    assert model.lm_head.weight is model.tok_emb.weight
    assert torch.equal(model(ids()), GPT(tiny(), seed=0)(ids()))


# Initial weights, seeds, devices


def test_seed_fixes_weights_and_leaves_global_state_alone():
    state = torch.get_rng_state()
    a, b, c = (GPT(tiny(), seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, a.parameters(), b.parameters()))
    assert not torch.equal(a.tok_emb.weight, c.tok_emb.weight)
    torch.manual_seed(5)
    d = GPT(tiny())
    torch.manual_seed(5)
    e = GPT(tiny())
    assert all(map(torch.equal, d.parameters(), e.parameters()))


def test_tying_does_not_change_the_other_weights_of_a_seed():
    tied, untied = (GPT(tiny(tie_weights=t), seed=3) for t in (True, False))
    for name, p in tied.named_parameters():
        assert torch.equal(p, untied.get_parameter(name)), name


def test_weights_are_the_same_under_another_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    model = GPT(tiny(), seed=0)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(ids()).dtype is torch.bfloat16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_weights_are_the_same_on_a_gpu():
    with torch.device("cuda"):
        there = GPT(tiny(), seed=0)
    here = GPT(tiny(), seed=0)
    assert all(torch.equal(a, b.cpu()) for a, b in
               zip(here.parameters(), there.parameters()))


def test_initialisation_has_the_sizes_of_gpt2():
    cfg = GPTConfig(500, 64, d_model=256, n_layers=8, n_heads=4,
                    activation="swiglu", qk_norm=True)
    model = GPT(cfg, seed=0)
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            assert p.eq(1).all(), name
        elif p.ndim == 1:
            assert p.eq(0).all(), name
        else:
            into = name.endswith(("o_proj.weight", "down_proj.weight"))
            wanted = 0.02 / math.sqrt(16) if into else 0.02
            assert abs(p.std().item() / wanted - 1) < 0.03, name
            assert abs(p.mean().item()) < wanted / 10, name


def test_init_weights_refills_in_place():
    model = GPT(tiny(), seed=0)
    before, pointer = model.tok_emb.weight.clone(), model.tok_emb.weight
    nn.init.zeros_(model.tok_emb.weight)
    init_weights(model, 0)
    assert model.tok_emb.weight is pointer
    assert torch.equal(model.tok_emb.weight, before)


@pytest.mark.parametrize("tie", [True, False])
def test_loss_at_the_start_is_that_of_knowing_nothing(tie):
    cfg = GPTConfig(1000, 64, d_model=128, n_layers=4, n_heads=4,
                    tie_weights=tie)
    model, x = GPT(cfg, seed=0), ids(8, 65, 1000)
    logits = model(x[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten()).item()
    assert abs(loss - math.log(1000)) < 0.1


def test_model_on_the_meta_device_runs_without_storage():
    for name in ("gpt2-xl", "llama-tiny"):
        with torch.device("meta"):
            model = GPT(GPTConfig.preset(name))
            out = model(torch.zeros(2, 16, dtype=torch.long))
        assert out.is_meta and out.shape == (2, 16, model.cfg.vocab_size)


# Dropout


def test_dropout_acts_in_training_only():
    model, x = GPT(tiny(dropout=0.3), seed=0), ids()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    assert torch.equal(model(x), GPT(tiny(), seed=0)(x))


def test_dropout_keeps_the_mean_of_the_embedding():
    model, x = GPT(tiny(dropout=0.25), seed=0), ids(1, 3)
    draws = torch.stack([model.embed(x) for _ in range(4000)])
    zero = draws.eq(0).double().mean().item()
    assert abs(zero - 0.25) < 0.01
    model.eval()
    scale = model.embed(x).abs().mean().item()
    assert (draws.mean(0) - model.embed(x)).abs().max() < 0.15 * scale + 0.004


# What is refused


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_integer_types_give_the_same_logits(dtype):
    model = GPT(tiny(), seed=0)
    assert torch.equal(model(ids().to(dtype)), model(ids()))


@pytest.mark.parametrize(("tokens", "parts"), [
    (torch.zeros(1, 13, dtype=torch.long), ("13", "12", "tokens[:, -12:]")),
    (torch.zeros(5, dtype=torch.long), ("(5,)", "(B, T)", "tokens[None]")),
    (torch.zeros(1, 0, dtype=torch.long), ("(1, 0)", "at least one")),
    (torch.zeros(0, 3, dtype=torch.long), ("(0, 3)", "at least one")),
    (torch.zeros(1, 4), ("float32", "int64", "tokens.long()")),
    (torch.zeros(1, 4).bool(), ("bool", "int64", "tokens.long()")),
    (torch.tensor([[0, 37]]), ("37", "0..36", "tokenizer")),
    (torch.tensor([[0, -1]]), ("-1", "0..36", "tokenizer")),
])
def test_tokens_that_do_not_fit(tokens, parts):
    with pytest.raises(ValueError) as error:
        GPT(tiny(), seed=0)(tokens)
    assert all(p in str(error.value) for p in parts), str(error.value)


def test_caches_that_do_not_fit():
    model = GPT(tiny(), seed=0)
    with pytest.raises(ValueError, match="pass cache="):
        model(ids(), n_new=[9, 3])
    with pytest.raises(ValueError, match="2 rows.*3.*cache.select"):
        model(ids(), model.new_cache(3))
    check_cache(ids(), None, None, model.cfg)
    rope = tiny(positions="rope")
    for other in ({"sliding_window": 3}, {"n_layers": rope.n_layers + 1},
                  {"n_kv_heads": 1},
                  {"sliding_window": 3, "n_sinks": 1}):
        cache = GPT(tiny(positions="rope", **other), seed=0).new_cache(
            len(ids()))
        with pytest.raises(ValueError, match="the cache has.*new_cache"):
            GPT(rope, seed=0)(ids(), cache)
    with pytest.raises(ValueError, match="max_length=13.*12"):
        model.new_cache(1, 13)
    assert GPT(tiny(positions="rope")).new_cache(1, 13).max_length == 13
    for bad in ({"max_length": 0}, {"max_length": -1}, {"max_length": 2.0},
                {"batch_size": 0}, {"batch_size": True}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}=.*at least"):
            model.new_cache(**bad)


LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(("changes", "parts"), [
    ({"vocab_size": 0}, ("vocab_size=0", "at least 1")),
    ({"context_length": -5}, ("context_length=-5", "at least 1")),
    ({"d_model": 2.5}, ("d_model=2.5", "int")),
    ({"d_model": None}, ("d_model=None", "int")),
    ({"d_model": "64"}, ("d_model='64'", "int")),
    ({"n_layers": True}, ("n_layers=True", "int")),
    ({"d_ff": 0}, ("d_ff=0", "at least 1")),
    ({"n_heads": 5}, ("d_model=24", "n_heads=5", "try n_heads=4")),
    ({"n_kv_heads": 3}, ("n_kv_heads=3", "n_heads=4", "divisor")),
    ({"n_kv_heads": 8}, ("n_kv_heads=8", "n_heads=4", "divisor")),
    ({"dropout": 1.0}, ("dropout=1.0", "[0, 1)")),
    ({"dropout": -0.1}, ("dropout=-0.1", "[0, 1)")),
    ({"norm_eps": 0.0}, ("norm_eps=0.0", "1e-5")),
    ({"norm_eps": -1e-5}, ("norm_eps=-1e-05", "1e-5")),
    ({"rope_theta": 0.0}, ("rope_theta=0.0", "10000")),
    ({"norm": "batch"}, ("'batch'", "'layer'", "'rms'")),
    ({"norm_position": "mid"}, ("'mid'", "'pre'", "'post'")),
    ({"positions": "rotary"}, ("'rotary'", "'rope'", "'alibi'")),
    ({"activation": "swish"}, ("'swish'", "gelu_tanh")),
    ({"positions": "sinusoidal", "d_model": 25, "n_heads": 5},
     ("d_model=25", "even")),
    ({"positions": "rope", "n_heads": 8}, ("head_dim=3", "even")),
    ({"rope_scaling": LINEAR}, ("rope_scaling", "positions='rope'")),
    ({"rope_theta": 5e5}, ("rope_theta=500000.0", "positions='rope'")),
    ({"positions": "rope", "rope_scaling": {"rope_type": "linear"}},
     ("rope_scaling", "factor")),
    ({"positions": "rope", "rope_scaling": {"rope_type": "yarn"}},
     ("rope_scaling", "linear")),
    ({"positions": "rope", "rope_scaling": LINEAR | {"factor": 0.0}},
     ("rope_scaling", "factor")),
    ({"positions": "rope", "rope_scaling": LINEAR | {"factor": math.nan}},
     ("rope_scaling", "nan", "rope_scaling=None")),
    ({"positions": "rope", "rope_theta": 1e-320}, ("rope_theta=1e-320",)),
    ({"n_sinks": 2}, ("n_sinks=2", "sliding_window")),
    ({"n_sinks": -1, "sliding_window": 4}, ("n_sinks=-1", "at least 0")),
    ({"sliding_window": 0}, ("sliding_window=0", "at least 1", "None")),
])
def test_config_refuses_and_names_the_remedy(changes, parts):
    with pytest.raises(ValueError) as error:
        tiny(**changes)
    assert all(p in str(error.value) for p in parts), str(error.value)


WRONG = [None, "1", 1, 1.5, -1, True, math.nan, math.inf, -math.inf,
         10**400, [1], {}, (), object()]


@pytest.mark.parametrize("field", dataclasses.fields(GPTConfig),
                         ids=lambda f: f.name)
def test_every_field_refuses_every_wrong_type(field):
    name, kind, refused = field.name, field.type, 0
    for value in WRONG:
        whole, number = type(value) is int, type(value) in (int, float)
        if get_origin(kind) is not None and kind is not None and (
                "Literal" in str(kind)):
            good = value in get_args(kind) if type(value) is str else False
        elif kind is bool:
            good = type(value) is bool
        elif kind is float:
            good = number and {"dropout": value == 0}.get(name, value > 0)
            good = good and abs(value) < math.inf
            if name == "rope_theta" and good:
                continue  # a number, but not with learned positions
        elif name == "rope_scaling":
            good = value is None
        elif name == "n_sinks":
            good = False  # 0 only, without a window
        else:
            good = whole and value >= 1
            good = good or value is None and name in (
                "n_kv_heads", "d_ff", "sliding_window")
            if name in ("d_model", "n_heads", "n_kv_heads") and good or (
                    value == 10**400):
                continue  # a count, but does it fit the others?
        if good:
            tiny(**{name: value})
            continue
        refused += 1
        with pytest.raises(ValueError, match=name):
            tiny(**{name: value})
    assert refused >= 8


def test_check_field_by_itself():
    check_field("n_sinks", 0, int)
    check_field("sliding_window", None, int | None)
    with pytest.raises(ValueError, match="or None"):
        check_field("sliding_window", 2.0, int | None)


# The config as a value


def test_config_round_trip_presets_and_unknown_fields():
    cfg = tiny(d_ff=50)
    assert GPTConfig.from_dict(dataclasses.asdict(cfg)) == cfg
    assert GPTConfig.preset("gpt2", d_model=96).d_ff == 4 * 96
    with pytest.raises(ValueError, match="gpt2-medium"):
        GPTConfig.preset("gpt5")
    with pytest.raises(ValueError, match="gpt2-medium"):
        GPTConfig.preset(["gpt2"])
    with pytest.raises(ValueError, match="n_embd"):
        GPTConfig.preset("gpt2", n_embd=96)
    with pytest.raises(ValueError, match="did you mean 'n_layers' for 'n_lay"):
        GPTConfig.preset("gpt2", n_layer=2)
    with pytest.raises(ValueError, match="missing.*vocab_size"):
        GPTConfig.from_dict({"d_model": 8})
    with pytest.raises(ValueError, match="unknown fields \\[3, 'x'\\]"):
        GPTConfig.from_dict({3: 4, "x": 1})
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.d_model = 7


@pytest.mark.parametrize("changes", SWITCHES + WINDOWS)
def test_every_config_survives_json(changes):
    cfg = tiny(**changes)
    text = json.dumps(dataclasses.asdict(cfg))
    assert GPTConfig.from_dict(json.loads(text)) == cfg
    assert hash(cfg) == hash(tiny(**changes))


def test_configs_of_the_first_version_still_load():
    old = {"vocab_size": 37, "context_length": 12, "d_model": 24,
           "n_layers": 3, "n_heads": 4, "d_ff": 96, "dropout": 0.0,
           "bias": True, "norm_eps": 1e-5, "norm_position": "pre",
           "activation": "gelu", "tie_weights": True}
    assert GPTConfig.from_dict(old) == tiny()


def test_a_config_does_not_share_the_callers_dict():
    scaling = dict(LINEAR)
    cfg = tiny(positions="rope", rope_scaling=scaling)
    scaling["factor"] = -1.0
    assert cfg.rope_scaling == LINEAR


def test_default_width_of_the_feed_forward():
    assert default_d_ff(128, "gelu") == 512
    assert default_d_ff(128, "swiglu") == 352
    assert tiny(activation="swiglu").d_ff == 64
    for D in range(8, 500, 7):
        wide = default_d_ff(D, "swiglu")
        assert wide % 32 == 0 and 0 <= wide - 8 * D / 3 < 32


@pytest.mark.parametrize("changes", [
    {"dropout": 0.2}, {"positions": "rope", "n_kv_heads": 1},
    {"positions": "alibi", "sliding_window": 4},
])  # fmt: skip
def test_checkpointed_blocks_give_the_same_gradients(changes):
    cfg = GPTConfig(vocab_size=11, context_length=8, d_model=16, n_layers=3,
                    n_heads=2, **changes)  # fmt: skip
    tokens = torch.arange(16).remainder(11).view(2, 8)
    found = []
    for again in (False, True):
        model = GPT(cfg, seed=0).train()
        model.checkpoint_blocks = again
        torch.manual_seed(1)  # of dropout
        model(tokens).logsumexp(-1).sum().backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
