"""Counts against built models, autograd, the FLOP counter and processes."""

import sys
import warnings
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import EXACT, TINY
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minillm import sample
from minillm.accounting import (
    MemoryMeter,
    account,
    activation_bytes,
    decode_bytes,
    decode_flops,
    flop_breakdown,
    flops_per_token,
    generation_memory,
    parameter_breakdown,
    process_peak,
    saved_bytes,
    step_memory,
    train_steps,
    visible_pairs,
)
from minillm.kvcache import visible
from minillm.transformer import (
    GPT,
    GPTConfig,
    count_parameters,
    preset_fields,
)

# PyTorch warns that RMSNorm under autocast has no fused version.
QUIET = "ignore:Mismatch dtype"


@pytest.fixture(autouse=True)
def one_thread():
    """Keep the engine's choices independent of what ran before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@st.composite
def configs(draw, head_dims=(4, 8, 16), context_length=40):
    """Draw any config: every switch of GPTConfig."""
    n_heads = draw(st.sampled_from([1, 2, 4, 6]))
    window = draw(st.sampled_from([None, None, 5, 30]))
    return GPTConfig(
        vocab_size=draw(st.sampled_from([50, 300])),
        context_length=context_length,
        d_model=n_heads * draw(st.sampled_from(head_dims)),
        n_layers=draw(st.integers(1, 3)),
        n_heads=n_heads,
        n_kv_heads=draw(
            st.sampled_from([k for k in (1, 2, 3, 6) if n_heads % k == 0])
        ),
        d_ff=draw(st.sampled_from([None, 72])),
        dropout=draw(st.sampled_from([0.0, 0.0, 0.1])),
        bias=draw(st.booleans()),
        norm=draw(st.sampled_from(["layer", "rms"])),
        norm_position=draw(st.sampled_from(["pre", "post"])),
        positions=draw(
            st.sampled_from(["none", "sinusoidal", "learned", "alibi", "rope"])
        ),
        activation=draw(
            st.sampled_from(["gelu", "gelu_tanh", "relu", "silu", "swiglu"])
        ),
        tie_weights=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        sliding_window=window,
        n_sinks=0 if window is None else draw(st.sampled_from([0, 2])),
    )


def random_tokens(cfg, B, T):
    tokens = torch.randint(cfg.vocab_size, (B, T + 1))
    return tokens[:, :-1], tokens[:, 1:].contiguous()


def loss_of(model, x, y, dtype="float32"):
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        logits = model(x)
    return F.cross_entropy(logits.float().flatten(0, 1), y.flatten())


@pytest.mark.parametrize("name", EXACT)
def test_presets_have_their_known_sizes(name):
    assert set(EXACT) == set(preset_fields())
    parts = parameter_breakdown(GPTConfig.preset(name))
    assert sum(parts.values()) == EXACT[name]


@settings(deadline=None, max_examples=60)
@given(cfg=configs())
def test_parameters_equal_those_of_a_built_model(cfg):
    parts = parameter_breakdown(cfg)
    with torch.device("meta"):
        model = GPT(cfg)
    assert sum(parts.values()) == count_parameters(model)
    assert sum(parts.values()) == count_parameters(cfg)
    assert parts["attention"] == sum(
        p.numel() for n, p in model.named_parameters()
        if ".attn." in n and "_norm" not in n
    )  # fmt: skip
    assert parts["feed-forward"] == sum(
        p.numel() for n, p in model.named_parameters() if ".ffn." in n
    )


def counted_flops(cfg, B, T, backward):
    with torch.device("meta"):
        model = GPT(cfg)
        x = torch.zeros(B, T, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as mode:
        logits = model(x)
        if backward:
            F.cross_entropy(logits.flatten(0, 1), x.flatten()).backward()
    return mode.get_total_flops()


@pytest.mark.parametrize("name", EXACT)
def test_flops_of_presets_equal_the_flop_counter(name):
    cfg = GPTConfig.preset(name, dropout=0.0)
    for backward in (False, True):
        ours = flops_per_token(cfg, backward=backward) * cfg.context_length
        counted = counted_flops(cfg, 1, cfg.context_length, backward)
        assert ours == counted  # within 2% was asked for


@settings(deadline=None, max_examples=40)
@given(cfg=configs(), B=st.integers(1, 3), T=st.integers(1, 40),
       backward=st.booleans())  # fmt: skip
def test_flops_of_any_config_equal_the_flop_counter(cfg, B, T, backward):
    ours = flops_per_token(cfg, T, backward=backward) * B * T
    # one token: torch takes products with one row for sums over products
    assert ours == pytest.approx(counted_flops(cfg, B, T, backward), rel=0.02)


def test_lengths_the_model_cannot_read_are_refused():
    for T in (0, 25, -1):
        for fn in (flop_breakdown, visible_pairs):
            with pytest.raises(ValueError, match=rf"={T} is outs.*1\.\.24"):
                fn(TINY, T)
        with pytest.raises(ValueError, match=rf"context_length={T}"):
            account(TINY, 2, T)


@settings(deadline=None, max_examples=40)
@given(cfg=configs(), T=st.integers(1, 40))
def test_visible_pairs_equal_the_mask(cfg, T):
    at = torch.arange(T)
    mask = visible(at, at, cfg.sliding_window, cfg.n_sinks)
    assert visible_pairs(cfg, T) == int(mask.sum())


@pytest.mark.filterwarnings(QUIET)
@settings(deadline=None, max_examples=40)
@given(cfg=configs(), dtype=st.sampled_from(["float32", "bfloat16"]),
       shape=st.sampled_from([(1, 40), (3, 20), (4, 33)]))  # fmt: skip
def test_activation_bytes_are_what_autograd_keeps(cfg, dtype, shape):
    warnings.filterwarnings("ignore", message="Mismatch dtype")
    model = GPT(cfg, seed=0)
    x, y = random_tokens(cfg, *shape)
    kept = saved_bytes(
        lambda: loss_of(model, x, y, dtype), list(model.parameters())
    )
    predicted = sum(activation_bytes(cfg, *shape, dtype=dtype).values())
    assert predicted == pytest.approx(kept, rel=0.05)


def test_saved_bytes_counts_storage_once_and_skips_weights():
    a = torch.randn(10, requires_grad=True)
    b = torch.randn(10, requires_grad=True)
    assert saved_bytes(lambda: (a * b).sum(), []) == 80
    assert saved_bytes(lambda: (a * b).sum(), [a]) == 40
    assert saved_bytes(lambda: (a * a[:5].repeat(2)).sum(), [a]) == 40
    assert saved_bytes(lambda: (a[:5] * a[5:]).sum(), []) == 40


def test_meter_follows_birth_and_death():
    outside = torch.ones(1000)
    with MemoryMeter(start=7) as meter:
        a = torch.ones(100)  # 400 bytes
        b = a + outside[:100]  # 400 more, and a view of nothing new
        view = b[:10]
        del b
        assert meter.live == 807  # the view holds the storage
        del view
        assert meter.live == 407
        outside.add_(1.0)
        assert meter.live == 407
        c = [torch.zeros(1000) for _ in range(2)]
        del c
    assert meter.live == 407 and meter.peak == 8407
    assert meter.timeline[-1][1] <= meter.peak
    del a
    assert meter.live == 7
    assert MemoryMeter(start=3).peak == 3


@pytest.mark.filterwarnings(QUIET)
@settings(deadline=None, max_examples=30)
@given(cfg=configs(head_dims=(16, 32), context_length=160),
       dtype=st.sampled_from(["float32", "bfloat16"]),
       shape=st.sampled_from([(1, 16), (2, 64), (3, 128)]))  # fmt: skip
def test_peak_of_a_step_is_predicted_within_ten_percent(cfg, dtype, shape):
    warnings.filterwarnings("ignore", message="Mismatch dtype")
    with MemoryMeter() as meter:
        train_steps(cfg, *shape, dtype)
    assert meter.live < 0.01 * meter.peak
    memory = step_memory(cfg, *shape, dtype=dtype)
    assert memory.peak == pytest.approx(meter.peak, rel=0.1)


LINUX = sys.platform == "linux"
MIDDLE = {
    "tales": (GPTConfig.preset("tales-1m"), 8),
    "llama": (GPTConfig.preset("llama-tiny"), 8),
    "shakespeare": (GPTConfig.preset("shakespeare-10m", dropout=0.0), 2),
}


@pytest.mark.skipif(not LINUX, reason="needs Linux's count of peak memory")
@pytest.mark.parametrize("name", MIDDLE)
def test_peak_is_within_ten_percent_of_a_process(name):
    cfg, B = MIDDLE[name]
    measured = process_peak(cfg, B)
    assert step_memory(cfg, B).peak == pytest.approx(measured, rel=0.1)


@pytest.mark.skipif(not LINUX, reason="needs Linux's count of peak memory")
def test_a_process_that_fails_says_why(monkeypatch):
    with pytest.raises(ValueError, match="batch_size=0"):
        process_peak(TINY, 0)
    with pytest.raises(ValueError, match="int8"):
        process_peak(TINY, 1, dtype="int8")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="measured process failed"):
        process_peak(TINY, 1)


def dry_peak(cfg, B, dtype):
    """Train on tensors without storage: sizes are right, bytes are none."""
    with torch.device("meta"):
        model = GPT(cfg)
    start = 4 * count_parameters(cfg)
    with FakeTensorMode(), patch("minillm.transformer.check_tokens"):
        for module in model.modules():
            for key, p in module._parameters.items():
                if p is not None:
                    fake = nn.Parameter(torch.empty(p.shape))
                    module._parameters[key] = fake
        model.tie()
        with MemoryMeter(start=start) as meter:
            train_steps(cfg, B, cfg.context_length, dtype, model=model)
    return meter.peak


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", EXACT)
def test_peak_of_every_preset_is_predicted_within_two_percent(name, dtype):
    cfg = GPTConfig.preset(name, dropout=0.0)
    memory = step_memory(cfg, 1, dtype=dtype)
    assert memory.peak == pytest.approx(dry_peak(cfg, 1, dtype), rel=0.02)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_run_without_storage_has_the_peak_of_a_real_one(dtype):
    cfg = GPTConfig.preset("tales-1m")
    with MemoryMeter() as meter:
        train_steps(cfg, 1, cfg.context_length, dtype)
    assert dry_peak(cfg, 1, dtype) == pytest.approx(meter.peak, rel=0.01)
    memory = step_memory(cfg, 1, dtype=dtype)
    assert memory.peak == pytest.approx(meter.peak, rel=0.05)


def test_sizes_that_cannot_be_are_refused():
    for fn in (activation_bytes, step_memory, account):
        with pytest.raises(ValueError, match="batch_size=0 must"):
            fn(TINY, 0)
    with pytest.raises(ValueError, match="batch_size=-1 must"):
        generation_memory(TINY, 4, batch_size=-1)
    with pytest.raises(ValueError, match="max_length=3 .*prompt_length=4"):
        generation_memory(TINY, 4, 3)
    with pytest.raises(ValueError, match="context_length=25"):
        generation_memory(TINY, 25)
    with pytest.raises(ValueError, match="n_past=-1 must"):
        decode_flops(TINY, -1)
    with pytest.raises(ValueError, match="n_past=-1 must"):
        decode_bytes(TINY, -1)
    with pytest.raises(ValueError, match="int8"):
        train_steps(TINY, 1, 4, "int8")
    for wrong in (0, -1, 2.0, "2"):
        for call, name in (
                (lambda n: account(TINY, n), "batch_size"),
                (lambda n: account(TINY, 1, n), "context_length"),
                (lambda n: generation_memory(TINY, n), "context_length"),
                (lambda n: generation_memory(TINY, 4, n), "max_length"),
                (lambda n: generation_memory(TINY, 4, batch_size=n),
                 "batch_size"),
                (lambda n: decode_bytes(TINY, 4, n), "batch_size"),
                (lambda n: decode_bytes(TINY, n or -2), "n_past"),
                (lambda n: decode_flops(TINY, n or -2), "n_past")):
            with pytest.raises(ValueError, match=f"{name}="):
                call(wrong)


def test_a_turned_head_is_in_the_peak_of_generation():
    cfg = GPTConfig(2**18, 64, 64, 1, 2)
    model = GPT(cfg, seed=0).eval()
    weights = sum(p.nbytes for p in model.parameters())
    for n_new, copies in ((40, 1), (31, 0)):
        with MemoryMeter(start=weights) as meter:
            sample.generate(model, torch.ones(1, 8, dtype=torch.long), n_new,
                            temperature=0)
        parts = generation_memory(cfg, 8, 8 + n_new)
        assert parts["turned head"] == copies * 4 * 2**24
        assert sum(parts.values()) == pytest.approx(meter.peak, rel=0.05)
    for more in ({"batch_size": 2}, {"dtype": "bfloat16"}):
        assert generation_memory(cfg, 8, **more)["turned head"] == 0
    small = replace(cfg, vocab_size=2**18 - 1)
    assert generation_memory(small, 8)["turned head"] == 0


def test_step_memory_adds_up_and_prints_narrow():
    memory = step_memory(TINY, 4)
    n = count_parameters(TINY)
    assert memory.weights == memory.gradients == 4 * n
    assert memory.optimizer == 8 * n
    assert memory.total == 16 * n + memory.activations
    assert memory.activations == sum(activation_bytes(TINY, 4).values())
    assert memory.peak == memory.moments[memory.moment]
    assert max(map(len, str(memory).splitlines())) <= 79
    for fn in (step_memory, activation_bytes, account):
        with pytest.raises(ValueError, match="int8"):
            fn(TINY, 4, dtype="int8")


def generate(model, prompt, n_new):
    """Read a prompt, then n_new - 1 tokens one by one, greedily."""
    cache = model.new_cache(len(prompt))
    tokens = prompt
    for _ in range(n_new):
        hidden = model.hidden(tokens, cache)[:, -1:]
        tokens = model.lm_head(hidden).argmax(-1)
    return cache


RUNNING = [
    GPTConfig.preset("tales-1m"),
    GPTConfig.preset("llama-tiny"),
    GPTConfig.preset("shakespeare-10m"),
    GPTConfig.preset("tales-1m", sliding_window=32, n_sinks=4),
    GPTConfig.preset("tales-1m", positions="alibi", n_kv_heads=1),
    GPTConfig.preset("llama-tiny", qk_norm=True, norm_position="post"),
]


@pytest.mark.filterwarnings(QUIET)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cfg", RUNNING)
@pytest.mark.parametrize("shape", [(1, 16), (3, 100)])
def test_generation_memory_is_predicted_within_ten_percent(cfg, shape, dtype):
    B, T = shape
    x, _ = random_tokens(cfg, B, T)
    model = GPT(cfg, seed=0).to(getattr(torch, dtype)).eval()
    weights = (4 if dtype == "float32" else 2) * count_parameters(cfg)
    with torch.no_grad(), MemoryMeter(start=weights) as meter:
        cache = generate(model, x, 3)
    parts = generation_memory(cfg, T, batch_size=B, dtype=dtype)
    assert parts["weights"] == weights
    assert parts["cache"] == cache.n_bytes
    assert sum(parts.values()) == pytest.approx(meter.peak, rel=0.05)


@pytest.mark.parametrize("window", [None, 6])
def test_decode_flops_equal_the_flop_counter(window):
    cfg = replace(TINY, sliding_window=window, n_sinks=2 if window else 0,
                  positions="rope", n_kv_heads=1)  # fmt: skip
    model, past = GPT(cfg, seed=0), 20
    x, _ = random_tokens(cfg, 2, past)  # one row: mv, which is not counted
    with torch.no_grad():
        cache = model.new_cache(2)
        model(x, cache)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(
                display=False) as mode:  # fmt: skip
            model(x[:, -1:], cache)
    assert 2 * decode_flops(cfg, past) == mode.get_total_flops()
    assert decode_flops(cfg, 0) == flops_per_token(cfg, 1, backward=False)


def test_decode_bytes_by_hand():
    cfg = replace(TINY, positions="none")
    weights = count_parameters(cfg)
    slot = 2 * cfg.n_layers * cfg.d_model
    assert decode_bytes(cfg, 9) == 4 * (weights + 10 * slot)
    assert decode_bytes(cfg, 9, 3) == 4 * (weights + 3 * 10 * slot)
    assert decode_bytes(cfg, 9, dtype="bfloat16") == 2 * (weights + 10 * slot)
    loose = replace(cfg, tie_weights=False, sliding_window=4)
    assert decode_bytes(loose, 9) == 4 * (weights + 4 * slot)


@pytest.mark.parametrize("name", EXACT)
def test_an_account_holds_and_prints_all(name):
    cfg = GPTConfig.preset(name, dropout=0.0)
    a = account(cfg, 2, dtype="bfloat16")
    assert a.n_parameters == EXACT[name]
    assert a.step_flops == flops_per_token(cfg) * 2 * cfg.context_length
    assert a.rule_ratio == flops_per_token(cfg) / (6 * EXACT[name])
    cache = 2 * 2 * 2 * cfg.n_layers * cfg.n_kv_heads * cfg.head_dim
    assert a.kv_bytes == cache * cfg.context_length
    assert max(map(len, str(a).splitlines())) <= 79
    assert f"{EXACT[name]:,} parameters" in str(a)


def test_an_account_of_a_windowed_model_counts_the_window():
    cfg = replace(TINY, sliding_window=4, n_sinks=1)
    assert account(cfg).kv_bytes == 4 * 2 * 2 * 32 * 5
    with pytest.raises(ValueError, match="batch_size=0"):
        account(TINY, 0)


def test_dropout_costs_squares_on_a_cpu():
    cfg = replace(TINY, dropout=0.1)
    dry = sum(activation_bytes(TINY, 1).values())
    wet = sum(activation_bytes(cfg, 1).values())
    squares = 3 * 4 * cfg.n_layers * cfg.n_heads * 24 * 24
    assert wet - dry > squares
    assert isinstance(GPT(cfg).blocks[0].attn.q_proj, nn.Linear)
