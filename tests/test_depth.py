"""Measuring tools for deep stacks: exact on small models, and no traces."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minillm.depth import (
    block_writes,
    evaluating,
    gradient_norms,
    hooked,
    mean_loss,
    paired_interval,
    position_similarity,
    previous_token_batches,
    remove_norms,
    rescale_init,
    residual_rms,
    skip_losses,
    stream_states,
    survived,
    train_copies,
    without_blocks,
)
from minillm.layers import IGNORE_INDEX
from minillm.transformer import GPT, GPTConfig

V, T = 11, 6


def make(seed=0, **changes):
    fields = {"vocab_size": V, "context_length": 8, "d_model": 16,
              "n_layers": 3, "n_heads": 2} | changes
    model = GPT(GPTConfig(**fields), seed=seed)
    rescale_init(model, 4.0)
    return model


def data(seed=0):
    return previous_token_batches(1, 4, T, V, seed)[0]


def n_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks)
               for m in model.modules())


@pytest.fixture(params=["pre", "post", "none"])
def model(request):
    m = make(norm_position="post" if request.param == "post" else "pre")
    if request.param == "none":
        remove_norms(m)
    return m


# -- looking ---------------------------------------------------------------


def test_states_are_what_the_blocks_compute(model):
    x, _ = data()
    states = stream_states(model, x)
    assert states.shape == (4, 4, T, 16) and not states.requires_grad
    with torch.no_grad():
        h = model.tok_emb(x) + model.pos_emb.weight[:T]
        for i, block in enumerate(model.blocks):
            torch.testing.assert_close(states[i], h)
            h = block(h)
        torch.testing.assert_close(states[-1], h)
        torch.testing.assert_close(model.norm(h), model.hidden(x))
    expected = states.double().pow(2).flatten(1).mean(1).sqrt().float()
    torch.testing.assert_close(residual_rms(model, x), expected)


def test_writes_add_up(model):
    """stream^2 + write^2 + 2 cos = next stream^2, exactly for one vector."""
    x = torch.tensor([[3]])
    w = block_writes(model, x)
    states = residual_rms(model, x)
    torch.testing.assert_close(w.stream[::2], states[:-1])
    after = (w.stream**2 + w.write**2
             + 2 * w.cosine * w.stream * w.write).sqrt()
    if model.cfg.norm_position == "pre":
        torch.testing.assert_close(after[1::2], states[1:])
        torch.testing.assert_close(after[::2], w.stream[1::2])
    else:
        torch.testing.assert_close(states[1:], torch.ones(3), atol=1e-3,
                                   rtol=0)
        torch.testing.assert_close(w.stream[1::2], torch.ones(3), atol=1e-3,
                                   rtol=0)


def test_writes_are_measured_without_dropout():
    m = make(dropout=0.5)
    assert m.training
    a, b = block_writes(m, data()[0]), block_writes(m, data()[0])
    assert torch.equal(a.write, b.write) and m.training


def test_gradient_norms_equal_backward(model):
    x, y = data()
    norms = gradient_norms(model, x, y)
    assert all(p.grad is None for p in model.parameters())
    mean_loss(model, x, y).backward()
    for block, norm in zip(model.blocks, norms):
        total = sum(p.grad.square().sum() for p in block.parameters())
        torch.testing.assert_close(norm, total.sqrt())


def test_gradient_norms_leave_grad_alone_and_work_without_grad_mode():
    m = make()
    x, y = data()
    mean_loss(m, x, y).backward()
    kept = {n: p.grad.clone() for n, p in m.named_parameters()}
    with torch.no_grad():
        gradient_norms(m, x, y)
    assert all(torch.equal(p.grad, kept[n]) for n, p in m.named_parameters())


def test_gradient_norms_with_frozen_weights():
    m = make()
    m.blocks[1].requires_grad_(False)
    norms = gradient_norms(m, *data())
    assert norms[1] == 0 and norms[0] > 0 and norms[2] > 0
    m.blocks.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        gradient_norms(m, *data())


def test_gradient_norms_follow_the_loss_in_float64():
    """A step against the gradient lowers the loss by its squared norm."""
    m = make().double()
    x, y = data()
    norms = gradient_norms(m, x, y)
    eps = 1e-5
    loss = mean_loss(m, x, y)
    params = list(m.blocks[1].parameters())
    grads = torch.autograd.grad(loss, params)
    with torch.no_grad():
        for p, g in zip(params, grads):
            p -= eps * g
        fall = (loss - mean_loss(m, x, y)) / eps
    torch.testing.assert_close(fall, norms[1] ** 2, rtol=1e-3, atol=0)


def test_similarity_of_equal_and_of_opposite_positions():
    m = make(n_layers=1, positions="none")
    x = torch.full((2, 3), 4)
    torch.testing.assert_close(position_similarity(m, x), torch.ones(2))
    with torch.no_grad():
        m.tok_emb.weight[1] = -m.tok_emb.weight[0]
    x = torch.tensor([[0], [1]])
    assert position_similarity(m, x)[0].item() == pytest.approx(-1.0)
    with pytest.raises(ValueError, match="two positions"):
        position_similarity(m, torch.tensor([[0]]))


def test_similarity_equals_the_loop():
    m = make()
    x, _ = data()
    h = F.normalize(stream_states(m, x).flatten(1, 2), dim=-1)
    n = h.shape[1]
    cosines = torch.stack([s @ s.T for s in h])
    off = ~torch.eye(n, dtype=torch.bool)
    expected = torch.stack([c[off].mean() for c in cosines])
    torch.testing.assert_close(position_similarity(m, x), expected,
                               atol=1e-5, rtol=1e-4)


# -- no traces -------------------------------------------------------------


@pytest.mark.parametrize("measure", [
    stream_states, residual_rms, position_similarity, block_writes])
def test_nothing_stays_behind(measure):
    m = make(dropout=0.1)
    m.blocks[1].eval()  # a mode of its own
    modes = [part.training for part in m.modules()]
    before = {n: p.clone() for n, p in m.named_parameters()}
    measure(m, data()[0])
    for bad in (torch.full((1, 4), V), torch.zeros(4, dtype=torch.long)):
        with pytest.raises(ValueError):
            measure(m, bad)
    assert n_hooks(m) == 0
    assert modes == [part.training for part in m.modules()]
    assert all(torch.equal(p, before[n]) for n, p in m.named_parameters())


def test_hooks_and_modes_come_back_after_errors():
    m = make(dropout=0.1)
    with pytest.raises(RuntimeError), evaluating(m), hooked(
            [(m.blocks[0], lambda *a: None)]):
        assert not m.training and n_hooks(m) == 1
        raise RuntimeError
    assert m.training and n_hooks(m) == 0
    with pytest.raises(AttributeError), hooked(
            [(m.blocks[0], lambda *a: None), (None, None)]):
        pass
    assert n_hooks(m) == 0
    for f in (gradient_norms, skip_losses):
        with pytest.raises(ValueError, match="one target for each"):
            f(m, data()[0], data()[1][:, 1:])
        assert m.training and n_hooks(m) == 0


def test_evaluating_turns_gradients_off_and_is_the_one_of_evaluate():
    from minillm import evaluate

    m = make(dropout=0.1)
    m.blocks[1].eval()
    modes = [part.training for part in m.modules()]
    for error in (None, RuntimeError):
        try:
            with evaluating(m) as same:
                assert same is m and not any(p.training for p in m.modules())
                assert not torch.is_grad_enabled()
                with torch.enable_grad():
                    assert m(data()[0]).requires_grad
                if error:
                    raise error
        except RuntimeError:
            pass
        assert torch.is_grad_enabled()
        assert modes == [part.training for part in m.modules()]
    assert evaluate.evaluating is evaluating


# -- leaving blocks out ----------------------------------------------------


def test_without_all_blocks_only_the_embedding_is_left(model):
    x, _ = data()
    with torch.no_grad(), without_blocks(model, [0, 1, 2, 1]):
        got = model.hidden(x)
        expected = model.norm(model.tok_emb(x) + model.pos_emb.weight[:T])
    torch.testing.assert_close(got, expected)
    assert n_hooks(model) == 0
    whole = model.hidden(x)
    assert not torch.allclose(whole, got)
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match="blocks 0 to 2"):
            with without_blocks(model, [wrong]):
                pass


def test_a_block_that_writes_nothing_costs_nothing_to_skip():
    m = make()
    with torch.no_grad():
        m.blocks[1].attn.o_proj.weight.zero_()
        m.blocks[1].ffn.down_proj.weight.zero_()
    rises = skip_losses(m, *data())
    assert rises.shape == (3,) and rises[1] == 0 and rises[0] != 0
    assert block_writes(m, data()[0]).write[2:4].tolist() == [0.0, 0.0]


# -- initial weights -------------------------------------------------------


def test_rescale_touches_each_matrix_once():
    cfg = make().cfg
    plain, scaled = GPT(cfg, seed=3), GPT(cfg, seed=3)
    rescale_init(scaled, 2.0, 3.0)
    assert scaled.lm_head.weight is scaled.tok_emb.weight
    for (name, a), b in zip(plain.named_parameters(), scaled.parameters()):
        factor = 1.0 if a.ndim < 2 else 2.0
        if "o_proj.weight" in name or "down_proj.weight" in name:
            factor = 6.0
        torch.testing.assert_close(b, factor * a)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_rescale_refuses(bad):
    m = make()
    before = m.tok_emb.weight.clone()
    for factors in ((bad, 1.0), (1.0, bad)):
        with pytest.raises(ValueError, match="finite number > 0"):
            rescale_init(m, *factors)
    assert torch.equal(before, m.tok_emb.weight)


def test_remove_norms():
    m = make(qk_norm=True)
    remove_norms(m)
    left = [n for n, p in m.named_modules() if "norm" in n
            and not isinstance(p, nn.Identity)]
    assert all("q_norm" in n or "k_norm" in n for n in left) and left
    assert torch.isfinite(m(data()[0])).all()


def test_variance_adds_up():
    """GPT-2's 1/sqrt(2 n_layers) keeps the stream's growth bounded."""
    rms = {}
    for n_layers in (4, 32):
        for writes in (1.0, math.sqrt(2 * n_layers)):
            m = make(n_layers=n_layers, d_model=32)
            rescale_init(m, 1.0, writes)
            r = residual_rms(m, data()[0])
            rms[n_layers, writes > 1] = (r[-1] / r[0]).item()
    assert rms[32, True] > 2 * rms[4, True]
    assert 0.8 < rms[32, False] / rms[4, False] < 1.25


def test_layer_and_rms_norm_start_from_the_same_matrices():
    """The chapter pairs them by seed."""
    layer = dict(make(seed=4).named_parameters())
    rms = dict(make(seed=4, norm="rms").named_parameters())
    for name, p in rms.items():
        assert torch.equal(p, layer[name])


# -- the task --------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(2, 9),
       st.integers(1, 30), st.integers(0, 99))
def test_task(n, B, T, V, seed):
    batches = previous_token_batches(n, B, T, V, seed)
    again = previous_token_batches(n, B, T, V, seed)
    assert len(batches) == n
    for (x, y), (x2, y2) in zip(batches, again):
        assert torch.equal(x, x2) and torch.equal(y, y2)
        assert x.shape == y.shape == (B, T)
        assert (y[:, 0] == IGNORE_INDEX).all()
        assert torch.equal(y[:, 1:], x[:, :-1])
        assert 0 <= x.min() and x.max() < V


def test_task_needs_two_positions():
    with pytest.raises(ValueError, match="at least 2"):
        previous_token_batches(1, 1, 1, 5)


# -- training side by side -------------------------------------------------


def alone(model, batches, lr, warmup=0, weight_decay=0.0):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr,
                                  betas=(0.9, 0.99), weight_decay=weight_decay)
    curve = []
    for step, (x, y) in enumerate(batches, 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, step / max(warmup, 1))
        loss = mean_loss(model, x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return torch.tensor(curve)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # RoPE
@pytest.mark.parametrize("kind", [
    {}, {"norm_position": "post"}, {"norm": "rms", "bias": False},
    {"qk_norm": True, "n_kv_heads": 1}, {"positions": "rope"},
    {"tie_weights": False}, {"positions": "alibi", "activation": "swiglu"}])
def test_copies_train_like_one_alone(kind):
    batches = previous_token_batches(8, 4, T, V)
    rates, decay = [1e-3, 5e-3, 5e-3], 0.1
    copies = [make(seed=s, **kind) for s in (0, 1, 2)]
    curves = train_copies(copies, batches, rates, warmup_steps=4,
                          weight_decay=decay)
    assert curves.shape == (3, 8)
    for s, lr in enumerate(rates):
        one = make(seed=s, **kind)
        curve = alone(one, batches, lr, 4, decay)
        torch.testing.assert_close(curves[s], curve, atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(
            copies[s](batches[0][0]), one(batches[0][0]), atol=5e-3, rtol=5e-3)


def test_a_copy_that_diverges_leaves_the_others_alone():
    batches = previous_token_batches(6, 4, T, V)
    a = train_copies([make(0), make(1)], batches, [1e-3, 1e30])
    b = train_copies([make(0)], batches, 1e-3)
    torch.testing.assert_close(a[0], b[0], atol=1e-5, rtol=1e-5)
    assert not survived(a, 2.0, last=2)[1]


def test_lr_zero_changes_nothing():
    m = make()
    before = {n: p.clone() for n, p in m.named_parameters()}
    train_copies([m], previous_token_batches(2, 2, T, V), 0.0)
    assert all(torch.equal(p, before[n]) for n, p in m.named_parameters())


def test_dropout_differs_between_copies_and_comes_from_the_seed():
    batches = previous_token_batches(3, 4, T, V)
    state = torch.get_rng_state()
    runs = [train_copies([make(0, dropout=0.5), make(0, dropout=0.5)],
                         batches, 1e-3, seed=s) for s in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0][0], runs[0][1])
    assert torch.equal(state, torch.get_rng_state())


def test_train_copies_refuses():
    batches = previous_token_batches(1, 2, T, V)
    with pytest.raises(ValueError, match="at least one"):
        train_copies([], batches, 1e-3)
    with pytest.raises(ValueError, match="2 learning rates for 1 models"):
        train_copies([make()], batches, [1e-3, 1e-3])
    with pytest.raises(ValueError, match="model 1 differs"):
        train_copies([make(), make(n_layers=2)], batches, 1e-3)
    with pytest.raises(ValueError, match="no batches"):
        train_copies([make()], [], 1e-3)
    bare = make()
    remove_norms(bare)
    with pytest.raises(ValueError, match="model 1 differs"):
        train_copies([make(), bare], batches, 1e-3)


# -- deciding --------------------------------------------------------------


def test_survived():
    losses = torch.tensor([[9.0, 1.0, 1.0], [9.0, 1.0, 3.1],
                           [9.0, math.nan, 1.0], [9.0, 1.0, math.inf]])
    assert survived(losses, 2.0, last=2).tolist() == [True, False, False,
                                                      False]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=16),
       st.floats(-100, 100), st.floats(0.1, 10))
def test_interval_moves_with_its_data(values, shift, scale):
    mean, low, high = paired_interval(values)
    assert low <= mean <= high
    assert mean == pytest.approx(sum(values) / len(values), abs=1e-6)
    moved = paired_interval([scale * v + shift for v in values])
    for a, b in zip(moved, (mean, low, high)):
        assert a == pytest.approx(scale * b + shift, abs=1e-5, rel=1e-6)


def test_interval_covers_95_percent():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(2000, 5, generator=generator)
    hits = sum(low <= 0 <= high for _, low, high in map(
        paired_interval, draws))
    assert 0.93 < hits / 2000 < 0.97


@pytest.mark.parametrize("bad", [[], [1.0], [0.0] * 17, [[1.0, 2.0]]])
def test_interval_refuses(bad):
    with pytest.raises(ValueError, match="one row of 2 to 16"):
        paired_interval(bad)
