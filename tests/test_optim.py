"""AdamW, Muon, parameter groups, schedules and the range test."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import SHAPE
from torch import nn

from minillm.layers import MixtureOfExperts
from minillm.optim import (
    QUINTIC,
    AdamW,
    JoinedOptimizer,
    Muon,
    hidden_matrices,
    lr_at,
    lr_range_test,
    make_optimizer,
    orthogonalize,
    param_groups,
    product_dtype,
    set_lr,
)
from minillm.pretrain import TrainConfig, cross_entropy
from minillm.transformer import GPT


def noise(*shape, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


def parameters(dtype=torch.float32):
    return [nn.Parameter(noise(*shape, seed=i, dtype=dtype))
            for i, shape in enumerate([(4, 3), (5,), (2, 3, 2), ()])]


def groups(params, **more):
    return [{"params": params[:1], "weight_decay": 0.3, **more},
            {"params": params[1:], "weight_decay": 0.0, **more}]


def give_gradients(params, step):
    """Random gradients of many sizes; one missing, one late."""
    for i, p in enumerate(params):
        missing = i == 1 and step % 3 == 0 or i == 2 and step < 40
        size = 10.0 ** (step % 5 - 2)
        p.grad = None if missing else size * noise(
            *p.shape, seed=100 * step + i, dtype=p.dtype)


def small_task():
    g = torch.Generator().manual_seed(1)
    x = torch.randint(SHAPE.vocab_size, (4, 17), generator=g)
    return x[:, :-1], x[:, 1:]


def train_a_step(model, optimizer):
    loss = cross_entropy(model(small_task()[0]), small_task()[1])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


# ---------------------------------------------------------------- AdamW


@pytest.mark.parametrize(("dtype", "fused", "tolerance"), [
    (torch.float64, False, 1e-12), (torch.float32, False, 1e-6),
    (torch.float32, True, 5e-6)])  # fmt: skip
def test_adamw_is_torchs_over_1000_steps(dtype, fused, tolerance):
    ours, theirs = parameters(dtype), parameters(dtype)
    mine = AdamW(groups(ours), lr=0.01, betas=(0.9, 0.95))
    engine = torch.optim.AdamW(groups(theirs), lr=0.01, betas=(0.9, 0.95),
                               fused=fused)  # fmt: skip
    for step in range(1000):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        rate = 0.01 * (1 + math.cos(step / 300))
        for optimizer in (mine, engine):
            set_lr(optimizer, rate)
            optimizer.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                mine.state[p][key], engine.state[q][key],
                rtol=tolerance, atol=tolerance)  # fmt: skip
    assert mine.state[ours[2]]["step"] == 960  # its first one was late


def test_adamw_state_dict_travels_between_the_two():
    for makers in ((AdamW, torch.optim.AdamW), (torch.optim.AdamW, AdamW)):
        first, second = parameters(torch.float64), parameters(torch.float64)
        a, b = (make(groups(p), lr=0.02) for make, p in
                zip(makers, (first, second)))  # fmt: skip
        for step in range(50):
            give_gradients(first, step)
            a.step()
        with torch.no_grad():
            for p, q in zip(first, second):
                q.copy_(p)
        b.load_state_dict(copy.deepcopy(a.state_dict()))
        for step in range(50, 60):
            for optimizer, params in ((a, first), (b, second)):
                give_gradients(params, step)
                optimizer.step()
        for p, q in zip(first, second):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_adamw_missing_gradients_and_closure():
    p, q = parameters()[:2]
    optimizer = AdamW([p, q], lr=0.1, weight_decay=0.5)
    before = q.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    start = p.square().sum().item()
    assert optimizer.step(closure).item() == pytest.approx(start)
    assert torch.equal(q, before) and not optimizer.state[q]
    assert p.square().sum() < start


@pytest.mark.parametrize(("option", "value"), [
    ("lr", -1.0), ("lr", math.nan), ("lr", math.inf), ("eps", -1e-8),
    ("weight_decay", -0.1), ("betas", (1.0, 0.9)),
    ("betas", (0.9, -0.1))])  # fmt: skip
def test_adamw_refuses(option, value):
    with pytest.raises(ValueError, match="must be a .*number"):
        AdamW(parameters(), **{option: value})


# ------------------------------------------------------ orthogonalize


def exact(matrix, steps=5):
    """Apply the quintic to the singular values themselves."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    a, b, c = QUINTIC
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag_embed(s) @ vh


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 24), cols=st.integers(1, 24),
       seed=st.integers(0, 999), steps=st.integers(0, 6))  # fmt: skip
def test_orthogonalize_acts_on_singular_values_only(rows, cols, seed, steps):
    m = noise(rows, cols, seed=seed, dtype=torch.float64)
    torch.testing.assert_close(
        orthogonalize(m, steps), exact(m, steps), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(
        orthogonalize(m.mT, steps), orthogonalize(m, steps).mT,
        rtol=1e-9, atol=1e-10)  # fmt: skip
    torch.testing.assert_close(
        orthogonalize(1e-6 * m, steps), orthogonalize(m, steps),
        rtol=1e-9, atol=1e-10)  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 40), cols=st.integers(1, 40),
       low=st.floats(0.02, 1.0), seed=st.integers(0, 999),
       dtype=st.sampled_from([torch.float32, torch.bfloat16]))  # fmt: skip
def test_orthogonality_error_is_bounded(rows, cols, low, seed, dtype):
    m = noise(rows, cols, seed=seed, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    spread = torch.linspace(1.0, low, len(s), dtype=torch.float64)
    x = orthogonalize((u * spread @ vh).float(), dtype=dtype)
    assert x.dtype == dtype and x.shape == m.shape
    s = torch.linalg.svdvals(x.double())
    margin = 0.0 if dtype == torch.float32 else 0.12
    assert s.min() > 0.675 - margin and s.max() < 1.14 + margin
    small = x.double() if rows <= cols else x.double().mT
    error = torch.linalg.matrix_norm(
        small @ small.mT - torch.eye(len(small)).double(), ord=2)
    assert error < 0.55 + margin


def test_orthogonalize_zeros_stacks_and_extremes():
    assert torch.equal(orthogonalize(torch.zeros(3, 5)), torch.zeros(3, 5))
    assert orthogonalize(torch.full((4, 4), 1e-30)).isfinite().all()
    assert orthogonalize(torch.full((4, 4), 1e15)).isfinite().all()
    stack = noise(2, 3, 7, 4)
    stack[0, 1] = 0
    out = orthogonalize(stack)
    assert out.shape == stack.shape and not out[0, 1].any()
    torch.testing.assert_close(out[1, 2], orthogonalize(stack[1, 2]))
    assert orthogonalize(stack[:0]).shape == (0, 3, 7, 4)
    assert orthogonalize(torch.ones(1, 1)).item() == pytest.approx(
        orthogonalize(torch.full((1, 1), 7.0)).item())  # fmt: skip
    for bad in (torch.ones(3), torch.ones(3, 3, dtype=torch.long)):
        with pytest.raises(ValueError, match="pass float matrices"):
            orthogonalize(bad)


# ---------------------------------------------------------------- Muon


def reference_muon(w, grads, lr, momentum, decay, nesterov):
    mean = torch.zeros_like(w)
    for g in grads:
        mean = momentum * mean + (1 - momentum) * g
        m = momentum * mean + (1 - momentum) * g if nesterov else mean
        w = w * (1 - lr * decay) - lr * max(
            1, w.shape[-2] / w.shape[-1]) ** 0.5 * exact(m)
    return w


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_against_singular_values(nesterov):
    shapes = [(6, 6), (9, 4), (4, 9), (4, 9), (3, 4, 9), (2, 2, 6, 6)]
    params = [nn.Parameter(noise(*s, seed=i, dtype=torch.float64))
              for i, s in enumerate(shapes)]  # fmt: skip
    start = [p.detach().clone() for p in params]
    grads = [[noise(*s, seed=50 * t + i, dtype=torch.float64)
              for i, s in enumerate(shapes)] for t in range(4)]
    muon = Muon(params, lr=0.05, momentum=0.9, weight_decay=0.1,
                nesterov=nesterov)  # fmt: skip
    for row in grads:
        for p, g in zip(params, row):
            p.grad = g.clone()
        muon.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, row))
    for i, (p, w) in enumerate(zip(params, start)):
        torch.testing.assert_close(
            p.detach(),
            reference_muon(w, [row[i] for row in grads], 0.05, 0.9, 0.1,
                           nesterov), rtol=1e-8, atol=1e-9)  # fmt: skip


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch < 2.9")
def test_muon_is_torchs_up_to_bfloat16():
    ours, theirs = ([nn.Parameter(noise(*s, seed=i)) for i, s in
                     enumerate([(16, 16), (16, 48), (48, 16)])]
                    for _ in range(2))  # fmt: skip
    mine = Muon(ours, lr=0.02, weight_decay=0.1, dtype=torch.bfloat16)
    engine = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1)
    for step in range(10):
        for i, (p, q) in enumerate(zip(ours, theirs)):
            p.grad = noise(*p.shape, seed=step + 100 * i)
            q.grad = p.grad.clone()
        mine.step()
        engine.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=0.0, atol=0.004)
        key = "momentum_buffer"
        torch.testing.assert_close(mine.state[p][key], engine.state[q][key])


def test_muon_zero_and_missing_gradients():
    params = [nn.Parameter(noise(4, 6, seed=i)) for i in range(3)]
    before = [p.detach().clone() for p in params]
    muon = Muon(params, lr=0.1)
    params[0].grad = torch.zeros(4, 6)
    params[1].grad = noise(4, 6, seed=9)
    muon.step()
    assert torch.equal(params[0], before[0])
    assert not torch.equal(params[1], before[1])
    assert torch.equal(params[2], before[2]) and not muon.state[params[2]]
    for p in params:
        p.grad = None
    muon.step()  # nothing at all to do


def test_muon_step_has_spectral_size_lr():
    for shape in ((8, 8), (8, 32), (32, 8)):
        p = nn.Parameter(noise(*shape))
        before = p.detach().clone()
        p.grad = 1e-4 * noise(*shape, seed=5)
        Muon([p], lr=0.02, dtype=torch.float32).step()
        s = torch.linalg.svdvals((before - p).detach()) / 0.02
        scale = max(1, shape[0] / shape[1]) ** 0.5
        assert 0.6 * scale < s.min() and s.max() < 1.2 * scale


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_muon_on_half_weights(kind):
    p = nn.Parameter(noise(4, 6).to(kind))
    p.grad = noise(4, 6, seed=3).to(kind)
    before = p.detach().clone()
    Muon([p], lr=0.1).step()
    assert p.dtype == kind and p.isfinite().all()
    assert not torch.equal(p, before)


def test_muon_refuses():
    with pytest.raises(ValueError, match="leave it to AdamW"):
        Muon([nn.Parameter(torch.ones(4))])
    for bad in ({"lr": -1.0}, {"momentum": 1.0}, {"weight_decay": -1.0}):
        with pytest.raises(ValueError, match="must be a .*number"):
            Muon([nn.Parameter(torch.ones(4, 4))], **bad)


def test_product_dtype():
    assert product_dtype(torch.ones(1).double()) == torch.float64
    assert product_dtype(torch.ones(1)) in (torch.float32, torch.bfloat16)
    assert product_dtype(torch.ones(1, device="meta")) == torch.float32


# ---------------------------------------------------- one object for both


def test_param_groups():
    model = GPT(SHAPE)
    decay, rest = param_groups(model, 0.3)
    assert decay["weight_decay"] == 0.3 and rest["weight_decay"] == 0.0
    assert all(p.dim() >= 2 for p in decay["params"])
    assert all(p.dim() < 2 for p in rest["params"])
    together = {id(p) for p in decay["params"] + rest["params"]}
    assert together == {id(p) for p in model.parameters()}
    model.pos_emb.weight.requires_grad_(False)
    decay, _ = param_groups(model, 0.3)
    assert all(p is not model.pos_emb.weight for p in decay["params"])


def test_hidden_matrices_are_those_of_the_blocks():
    model = GPT(SHAPE)
    names = {id(p): n for n, p in model.named_parameters()}
    hidden = [names[id(p)] for p in hidden_matrices(model)]
    each = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj",
            "ffn.up_proj", "ffn.down_proj")  # fmt: skip
    assert sorted(hidden) == sorted(
        f"blocks.{i}.{name}.weight" for i in range(2) for name in each)


def test_experts_go_to_muon_and_routers_do_not():
    model = GPT(SHAPE)
    for block in model.blocks:
        block.ffn = MixtureOfExperts(16, 32, n_experts=3)
    names = {id(p): n for n, p in model.named_parameters()}
    hidden = [names[id(p)] for p in hidden_matrices(model)]
    assert sum("experts" in name for name in hidden) == 2 * 3 * 2
    assert not any("router" in name for name in hidden)
    optimizer = make_optimizer(model, TrainConfig(optimizer="muon"))
    covered = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(covered) == sorted(names)
    first = train_a_step(model, optimizer)
    for _ in range(10):
        last = train_a_step(model, optimizer)
    assert last < first


def test_grouped_experts_are_a_stack():
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Module()])
            self.blocks[0].up = nn.Parameter(noise(3, 8, 4))

    model = Grouped()
    optimizer = make_optimizer(model, TrainConfig(
        optimizer="muon", weight_decay=0.0, muon_lr=0.1))
    before = model.blocks[0].up.detach().clone()
    model.blocks[0].up.grad = noise(3, 8, 4, seed=2)
    optimizer.step()
    s = torch.linalg.svdvals((before - model.blocks[0].up).detach())
    assert s.shape == (3, 4)  # each expert has a step of its own
    assert (s > 0.1 * 0.5).all() and (s < 0.1 * 1.8).all()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_make_optimizer(kind):
    model = GPT(SHAPE)
    cfg = TrainConfig(optimizer=kind, lr=1e-2, muon_lr=0.05,
                      weight_decay=0.2)  # fmt: skip
    optimizer = make_optimizer(model, cfg)
    assert isinstance(
        optimizer, JoinedOptimizer if kind == "muon" else torch.optim.AdamW)
    assert isinstance(optimizer, torch.optim.Optimizer)
    ids = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    scales = [g["lr_scale"] for g in optimizer.param_groups]
    assert scales == [1.0, 1.0] + [5.0] * (kind == "muon")
    set_lr(optimizer, 1e-3)
    for g in optimizer.param_groups:
        assert g["lr"] == pytest.approx(1e-3 * g["lr_scale"])
        shrink = g["lr"] * g["weight_decay"]
        assert shrink == 0 or shrink == pytest.approx(1e-3 * 0.2)
    losses = [train_a_step(model, optimizer) for _ in range(30)]
    assert losses[-1] < losses[0] - 0.2
    assert set(optimizer.state) == set(model.parameters())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_optimizer_round_trips(kind):
    cfg = TrainConfig(optimizer=kind, lr=1e-2)
    model = GPT(SHAPE)
    model.eval()
    optimizer = make_optimizer(model, cfg)
    for _ in range(3):
        train_a_step(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    twin = copy.deepcopy(model)
    loaded = make_optimizer(twin, cfg)
    loaded.load_state_dict(saved)
    pair = copy.deepcopy((model, optimizer))  # copied together
    key_by_key = make_optimizer(third := copy.deepcopy(model), cfg)
    for p, q in zip(model.parameters(), third.parameters()):
        for key, value in optimizer.state[p].items():
            key_by_key.state[q][key] = value.clone()
    for _ in range(3):
        train_a_step(model, optimizer)
        for other, opt in ((twin, loaded), pair, (third, key_by_key)):
            train_a_step(other, opt)
    for other in (twin, pair[0], third):
        for p, q in zip(model.parameters(), other.parameters()):
            assert torch.equal(p, q)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_gradient_scaler(kind):
    cfg = TrainConfig(optimizer=kind, lr=1e-2)
    plain, scaled = GPT(SHAPE, seed=0), GPT(SHAPE, seed=0)
    plain.eval(), scaled.eval()
    a, b = make_optimizer(plain, cfg), make_optimizer(scaled, cfg)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = small_task()
    for _ in range(2):
        train_a_step(plain, a)
        scaler.scale(cross_entropy(scaled(x), y)).backward()
        scaler.unscale_(b)
        scaler.step(b)
        scaler.update()
        b.zero_grad()
    for p, q in zip(plain.parameters(), scaled.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=2e-3)
    before = [p.detach().clone() for p in scaled.parameters()]
    scaler.scale(cross_entropy(scaled(x), y)).backward()
    scaled.blocks[0].ffn.up_proj.weight.grad[0, 0] = math.inf
    scaler.unscale_(b)
    scaler.step(b)
    assert all(map(torch.equal, before, scaled.parameters()))


def test_make_optimizer_frozen_parts():
    model = GPT(SHAPE)
    model.blocks[0].requires_grad_(False)
    optimizer = make_optimizer(model, TrainConfig(optimizer="muon"))
    frozen = {id(p) for p in model.blocks[0].parameters()}
    assert not frozen & {
        id(p) for g in optimizer.param_groups for p in g["params"]}
    before = [p.detach().clone() for p in model.blocks[0].parameters()]
    train_a_step(model, optimizer)
    assert all(map(torch.equal, before, model.blocks[0].parameters()))
    model.blocks.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable matrix"):
        make_optimizer(model, TrainConfig(optimizer="muon"))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter needs a gradient"):
        make_optimizer(model, TrainConfig())


def test_joined_refuses_groups_and_shares_closure():
    p, q = nn.Parameter(noise(3, 3)), nn.Parameter(noise(3, seed=1))
    joined = JoinedOptimizer(Muon([p]), AdamW([q], lr=0.1))
    with pytest.raises(ValueError, match="no further groups"):
        joined.add_param_group({"params": [nn.Parameter(torch.ones(1))]})

    def closure():
        joined.zero_grad()
        loss = p.square().sum() + q.square().sum()
        loss.backward()
        return loss

    losses = [joined.step(closure).item() for _ in range(5)]
    assert losses[-1] < losses[0]
    assert "momentum_buffer" in joined.state[p]
    assert "exp_avg" in joined.state[q]


# ---------------------------------------------------------- schedules


SCHEDULES = ("cosine", "linear", "wsd", "constant")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule(schedule):
    cfg = TrainConfig(lr=1.0, min_lr=0.1, warmup_steps=10, max_steps=100,
                      schedule=schedule)  # fmt: skip
    rates = [lr_at(s, cfg) for s in range(100)]
    assert 0 < rates[0] < 0.11 and rates[10] == 1.0
    assert all(b > a for a, b in zip(rates[:10], rates[1:11]))
    assert all(b <= a for a, b in zip(rates[10:], rates[11:]))
    assert math.isclose(rates[-1], 1.0 if schedule == "constant" else 0.1)
    assert lr_at(1000, cfg) == rates[-1]


def test_wsd_stays_and_falls():
    cfg = TrainConfig(lr=1.0, min_lr=0.0, warmup_steps=10, max_steps=100,
                      schedule="wsd", decay_fraction=0.2)  # fmt: skip
    rates = [lr_at(s, cfg) for s in range(100)]
    assert set(rates[10:80]) == {1.0} and rates[80] < 1.0
    falls = [a - b for a, b in zip(rates[79:], rates[80:])]
    assert all(math.isclose(f, 0.05) for f in falls)
    longer = TrainConfig(lr=1.0, min_lr=0.0, warmup_steps=10, max_steps=300,
                         schedule="wsd", decay_fraction=0.2)  # fmt: skip
    assert [lr_at(s, longer) for s in range(80)] == rates[:80]
    whole = TrainConfig(lr=1.0, min_lr=0.0, warmup_steps=10, max_steps=100,
                        schedule="wsd", decay_fraction=1.0)  # fmt: skip
    line = TrainConfig(lr=1.0, min_lr=0.0, warmup_steps=10, max_steps=100,
                       schedule="linear")  # fmt: skip
    assert all(lr_at(s, whole) == lr_at(s, line) for s in range(100))


@settings(max_examples=100, deadline=None)
@given(schedule=st.sampled_from(SCHEDULES), max_steps=st.integers(1, 50),
       warmup=st.integers(0, 60), fraction=st.floats(0.01, 1.0),
       step=st.integers(0, 70))  # fmt: skip
def test_rates_stay_in_bounds(schedule, max_steps, warmup, fraction, step):
    cfg = TrainConfig(lr=1.0, min_lr=0.1, warmup_steps=warmup,
                      max_steps=max_steps, schedule=schedule,
                      decay_fraction=fraction)  # fmt: skip
    rate = lr_at(step, cfg)
    if step < warmup:
        assert rate == (step + 1) / (warmup + 1)
    else:
        assert 0.1 - 1e-12 <= rate <= 1.0


def test_schedule_without_room():
    cfg = TrainConfig(max_steps=1, warmup_steps=0, lr=1.0, min_lr=0.5)
    assert 0.5 <= lr_at(0, cfg) <= 1.0
    for schedule in SCHEDULES:  # one step left after the warm-up
        cfg = TrainConfig(max_steps=6, warmup_steps=5, lr=1.0, min_lr=0.1,
                          schedule=schedule)  # fmt: skip
        assert lr_at(5, cfg) == 1.0
        cfg = TrainConfig(max_steps=6, warmup_steps=50, lr=1.0, min_lr=0.1,
                          schedule=schedule)  # fmt: skip
        assert lr_at(5, cfg) == pytest.approx(6 / 51)  # cut off
    with pytest.raises(ValueError, match="count the steps done"):
        lr_at(-1, cfg)


# ---------------------------------------------------------- range test


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_range_test(kind):
    model = GPT(SHAPE)
    before = [p.detach().clone() for p in model.parameters()]
    batches = [small_task()] * 60
    cfg = TrainConfig(optimizer=kind, lr=1e-3, muon_lr=0.02)
    result = lr_range_test(model, batches, cfg, low=1e-6, high=10.0)
    assert all(map(torch.equal, before, model.parameters()))
    assert all(p.grad is None for p in model.parameters()) and model.training
    assert result.rates[0] == pytest.approx(1e-6)
    assert all(b > a for a, b in zip(result.rates, result.rates[1:]))
    assert len(result.rates) == len(result.losses) == len(result.smooth)
    assert result.suggestion in result.rates
    assert 1e-5 < result.suggestion < 1.0


def test_range_test_stops_and_refuses():
    model = GPT(SHAPE)
    x, y = small_task()
    with torch.no_grad():
        model.blocks[0].ffn.up_proj.weight[0, 0] = math.nan
    broken = lr_range_test(model, [(x, y)] * 20)
    assert len(broken.rates) == 1
    with pytest.raises(ValueError, match="too few"):
        lr_range_test(model, [(x, y)] * 19)
    for low, high in ((0.0, 1.0), (1.0, 1.0), (1.0, 0.1), (1.0, math.inf)):
        with pytest.raises(ValueError, match="0 < low < high"):
            lr_range_test(model, [(x, y)] * 20, low=low, high=high)
