"""Hand-written layers equal torch's, gradients too; experts share the work."""

import copy
import math
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck
from torch.testing import assert_close

from minillm.attention import reachability
from minillm.kvcache import Linear
from minillm.layers import (
    IGNORE_INDEX,
    FeedForward,
    LayerNorm,
    MixtureOfExperts,
    RMSNorm,
    Routing,
    activation_function,
    embed,
    expert_load,
    layer_norm,
    load_balance_loss,
    make_norm,
    rms_norm,
    softmax_cross_entropy,
)
from minillm.transformer import GPT, GPTConfig

TIGHT = {"rtol": 1e-10, "atol": 1e-12}
DTYPES = [torch.float32, torch.float64]


def outputs_and_gradients(fn, *inputs):
    """The output, and the gradients of a random weighted sum of it."""
    inputs = [z.detach().clone().requires_grad_() for z in inputs]
    out = fn(*inputs)
    g = torch.Generator().manual_seed(7)
    up = torch.randn(out.shape, dtype=torch.float64, generator=g)
    return [out, *torch.autograd.grad(out, inputs, up.to(out.dtype))]


def message(fn, *args, **kwargs):
    with pytest.raises(ValueError) as error:
        fn(*args, **kwargs)
    return str(error.value)


@pytest.mark.parametrize("dropout", [1.0, -0.1, "0.1", float("nan")])
def test_dropout_is_a_chance_below_one(dropout):
    for make in (FeedForward, partial(MixtureOfExperts, n_experts=2)):
        assert "switches it off" in message(make, 8, 16, dropout=dropout)


@pytest.mark.parametrize("more", [
    {"top_k": 2.0}, {"top_k": "2"}, {"top_k": True}, {"n_experts": 4.0}])
def test_experts_are_counted_in_whole_numbers(more):
    given = {"n_experts": 4, "top_k": 1} | more
    assert "whole numbers" in message(MixtureOfExperts, 8, 16, **given)


# Norms


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(16,), (1, 1), (3, 7), (2, 5, 16), (0, 4)])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_norms_by_hand_equal_torch(dtype, shape, offset):
    D = shape[-1:]
    x = offset + 3 * torch.randn(shape, dtype=dtype)
    w, b = torch.randn(D, dtype=dtype), torch.randn(D, dtype=dtype)
    close = {"rtol": 1e-4, "atol": 3e-4} if dtype == torch.float32 else TIGHT
    pairs = [
        (layer_norm, lambda x, w, b: F.layer_norm(x, D, w, b), (x, w, b)),
        (layer_norm, lambda x, w: F.layer_norm(x, D, w), (x, w)),
        (rms_norm, lambda x, w: F.rms_norm(x, D, w, 1e-5), (x, w)),
    ]
    for ours, torchs, inputs in pairs:
        assert_close(outputs_and_gradients(ours, *inputs),
                     outputs_and_gradients(torchs, *inputs), **close)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_norm_gradients_by_finite_differences(scale):
    x = (scale * torch.randn(2, 3, 6)).double().requires_grad_()
    w = torch.randn(6).double().requires_grad_()
    b = torch.randn(6).double().requires_grad_()
    h = {"eps": 1e-6 * min(scale, 1), "atol": 1e-4, "rtol": 1e-4}
    assert gradcheck(layer_norm, (x, w, b), **h)
    assert gradcheck(layer_norm, (x, w), **h)
    assert gradcheck(rms_norm, (x, w), **h)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_of_half_precision_sum_in_float32(dtype):
    x = (300 * torch.randn(4, 512)).to(dtype)  # squares exceed 65,504
    w, b = torch.randn(512).to(dtype), torch.randn(512).to(dtype)
    eps = torch.finfo(dtype).eps
    for ours, torchs, inputs in (
        (layer_norm, lambda x, w, b: F.layer_norm(x, (512,), w, b), (x, w, b)),
        (rms_norm, lambda x, w: F.rms_norm(x, (512,), w, 1e-5), (x, w)),
    ):
        got = outputs_and_gradients(ours, *inputs)
        assert all(z.dtype == dtype and z.isfinite().all() for z in got)
        exact = outputs_and_gradients(torchs, *(z.double() for z in inputs))
        for a, wanted in zip(got, exact, strict=True):
            limit = 4 * eps * wanted.abs().max().item()
            assert (a.double() - wanted).abs().max() < limit
    mixed = layer_norm(x, w.float(), b.float())
    assert mixed.dtype == dtype


@given(
    st.integers(1, 40), st.floats(-1e3, 1e3), st.floats(0.1, 1e3),
    st.integers(0, 99))
def test_norms_forget_offset_and_scale(D, offset, scale, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(D, generator=g, dtype=torch.float64)
    ones = torch.ones(D, dtype=torch.float64)
    a = layer_norm(x, ones, None, 1e-30)
    if D > 1 and x.std() > 1e-3:
        b = layer_norm(scale * x + offset, ones, None, 1e-30)
        assert_close(a, b, rtol=1e-6, atol=1e-6)
        assert abs(a.mean()) < 1e-9
        assert abs(a.square().mean() - 1) < 1e-9
    r = rms_norm(x, ones, 1e-30)
    assert_close(rms_norm(scale * x, ones, 1e-30), r)
    assert abs(r.square().mean() - 1) < 1e-9
    assert_close(rms_norm(x - x.mean(), ones, 1e-30), a)


def test_gradient_has_no_part_along_mean_or_input():
    x = torch.randn(5, 32, dtype=torch.float64)
    w = torch.randn(32, dtype=torch.float64)
    _, dx, _ = outputs_and_gradients(
        lambda x, w: layer_norm(x, w, None, 1e-30), x, w)
    assert_close(dx.sum(-1), torch.zeros(5).double(), rtol=0, atol=1e-12)
    assert_close((dx * x).sum(-1), torch.zeros(5).double(), rtol=0, atol=1e-11)
    _, dx, _ = outputs_and_gradients(
        lambda x, w: rms_norm(x, w, 1e-30), x, w)
    assert_close((dx * x).sum(-1), torch.zeros(5).double(), rtol=0, atol=1e-11)


def test_layer_norm_survives_a_large_offset():
    x = torch.randn(8, 64)
    far = x.double() + 1e4
    ones, zeros = torch.ones(64), torch.zeros(64)
    wanted = layer_norm(far.float().double(), ones.double(), zeros.double())
    got = layer_norm(far.float(), ones, zeros)
    assert_close(got.double(), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_modules_equal_torch_and_load_its_weights(dtype, bias):
    ours = LayerNorm(16, bias=bias).to(dtype)
    ref = nn.LayerNorm(16, bias=bias).to(dtype)
    rms, rms_ref = RMSNorm(16).to(dtype), nn.RMSNorm(16, 1e-5).to(dtype)
    x = 100 + 10 * torch.randn(2, 5, 16, dtype=dtype)
    for a, b in ((ours, ref), (rms, rms_ref)):
        nn.init.normal_(a.weight)
        b.load_state_dict(a.state_dict())
        assert_close(outputs_and_gradients(a, x), outputs_and_gradients(b, x))
    by_hand = layer_norm(x, ours.weight, ours.bias)
    assert_close(ours(x), by_hand, rtol=1e-4, atol=1e-5)
    assert_close(rms(x), rms_norm(x, rms.weight), rtol=1e-4, atol=1e-5)


def test_layer_norm_of_a_constant_vector_is_its_bias():
    norm = LayerNorm(8)
    nn.init.constant_(norm.bias, 0.5)
    x = torch.full((1, 8), 3.0)
    for out in (norm(x), layer_norm(x, norm.weight, norm.bias)):
        assert_close(out, torch.full((1, 8), 0.5))


def test_make_norm():
    assert isinstance(make_norm("rms", 4, 1e-6), RMSNorm)
    norm = make_norm("layer", 4, 1e-6, bias=False)
    assert isinstance(norm, LayerNorm)
    assert norm.bias is None and norm.eps == 1e-6
    assert "'batch'" in message(make_norm, "batch", 4)


@pytest.mark.parametrize("fn", [layer_norm, rms_norm])
def test_norm_refuses_a_weight_of_another_width(fn):
    text = message(fn, torch.randn(3, 8), torch.ones(7))
    assert all(p in text for p in ("weight", "(7,)", "(3, 8)"))
    message(fn, torch.tensor(1.0), torch.ones(1))
    message(layer_norm, torch.ones(3, 8), torch.ones(8), torch.ones(3))


def test_second_derivatives_are_refused_and_not_wrong():
    x = torch.randn(2, 4, requires_grad=True)
    (dx,) = torch.autograd.grad(
        layer_norm(x, torch.ones(4)).pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


# Activations and feed-forward


@pytest.mark.parametrize(("name", "formula"), [
    ("relu", lambda x: x * (x > 0)),
    ("gelu", lambda x: x / 2 * (1 + torch.erf(x / math.sqrt(2)))),
    ("gelu_tanh", lambda x: x / 2 * (1 + torch.tanh(
        math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
    ("silu", lambda x: x / (1 + torch.exp(-x))),
    ("swiglu", lambda x: x / (1 + torch.exp(-x))),
])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_follow_their_formulas(name, formula, dtype):
    x = torch.linspace(-8, 8, 400, dtype=dtype)
    close = TIGHT if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    assert_close(outputs_and_gradients(activation_function(name), x),
                 outputs_and_gradients(formula, x), **close)


def test_unknown_activation():
    text = message(activation_function, "swish")
    assert "'swish'" in text and "gelu_tanh" in text
    message(FeedForward, 4, 8, activation="geglu")


@pytest.mark.parametrize("bias", [True, False])
def test_feed_forward_is_its_formula_and_works_by_position(bias):
    ffn = FeedForward(8, 20, activation="relu", bias=bias).double()
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    plain = nn.Sequential(nn.Linear(8, 20, bias), nn.ReLU(),
                          nn.Linear(20, 8, bias)).double()
    names = [n.replace("up_proj", "0").replace("down_proj", "2")
             for n in ffn.state_dict()]
    plain.load_state_dict(dict(zip(names, ffn.state_dict().values(),
                                   strict=True)))
    assert_close(outputs_and_gradients(ffn, x),
                 outputs_and_gradients(plain, x))
    assert torch.equal(reachability(ffn, x, x + 1), torch.eye(6).bool())


def test_swiglu_is_its_formula():
    ffn = FeedForward(8, 20, activation="swiglu", bias=False).double()
    x = torch.randn(3, 8, dtype=torch.float64)
    gate, up, down = (m.weight for m in (ffn.gate_proj, ffn.up_proj,
                                         ffn.down_proj))
    hidden = F.silu(x @ gate.T) * (x @ up.T)
    assert_close(ffn(x), hidden @ down.T)
    assert sum(p.numel() for p in ffn.parameters()) == 3 * 8 * 20


def test_dropout_acts_in_training_only():
    ffn, x = FeedForward(8, 16, dropout=0.5), torch.randn(4, 8)
    assert not torch.equal(ffn(x), ffn(x))
    ffn.eval()
    assert torch.equal(ffn(x), ffn(x))


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_one_row_without_gradients_is_the_same(activation):
    ffn = FeedForward(8, 16, activation=activation)
    x = torch.randn(1, 1, 8)
    with torch.no_grad():
        assert_close(ffn(x), ffn(x.expand(2, 1, 8))[:1])
        assert ffn(x).shape == (1, 1, 8)
    assert ffn(torch.zeros(0, 8)).shape == (0, 8)


# Cross-entropy and embedding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5,), (1, 2), (3, 7), (2, 4, 11)])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_cross_entropy_equals_torch(dtype, shape, scale):
    logits = scale * torch.randn(shape, dtype=dtype)
    targets = torch.randint(shape[-1], shape[:-1])
    if targets.ndim > 1:
        targets[0, 0] = IGNORE_INDEX

    def torchs(z):
        return F.cross_entropy(z.reshape(-1, shape[-1]), targets.flatten())

    got = outputs_and_gradients(
        lambda z: softmax_cross_entropy(z, targets), logits)
    assert all(z.isfinite().all() for z in got)
    assert_close(got, outputs_and_gradients(torchs, logits))


def test_cross_entropy_gradient_by_finite_differences():
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 5, -1, 3])
    assert gradcheck(
        lambda z: softmax_cross_entropy(z, targets, ignore_index=-1), logits)


def test_cross_entropy_knows_masked_logits_and_no_targets():
    logits = torch.tensor([[0.0, -math.inf, 1.0]], requires_grad=True)
    loss = softmax_cross_entropy(logits, torch.tensor([2]))
    loss.backward()
    assert_close(loss, F.cross_entropy(logits, torch.tensor([2])))
    assert logits.grad[0, 1] == 0 and logits.grad.isfinite().all()
    assert softmax_cross_entropy(logits, torch.tensor([1])) == math.inf
    for z, t in ((torch.randn(2, 3), torch.tensor([IGNORE_INDEX] * 2)),
                 (torch.randn(0, 3), torch.zeros(0, dtype=torch.long))):
        z.requires_grad_()
        loss = softmax_cross_entropy(z, t)
        loss.backward()
        assert loss == 0 and (z.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cross_entropy_of_half_precision(dtype):
    logits = (20 * torch.randn(64, 500)).to(dtype)
    targets = torch.randint(500, (64,))
    loss, grad = outputs_and_gradients(
        lambda z: softmax_cross_entropy(z, targets), logits)
    exact = outputs_and_gradients(
        lambda z: F.cross_entropy(z, targets), logits.double())
    eps = torch.finfo(dtype).eps
    assert loss.dtype == grad.dtype == dtype
    assert_close(loss.double(), exact[0], rtol=eps, atol=0)
    assert_close(grad.double(), exact[1], rtol=2 * eps, atol=1e-7)


@given(st.integers(1, 5), st.integers(1, 9), st.floats(-1e4, 1e4),
       st.integers(0, 99))
def test_cross_entropy_ignores_a_shift_of_the_logits(N, V, shift, seed):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(N, V, generator=g, dtype=torch.float64)
    t = torch.randint(V, (N,), generator=g)
    a, da = outputs_and_gradients(lambda z: softmax_cross_entropy(z, t), z)
    b, db = outputs_and_gradients(
        lambda z: softmax_cross_entropy(z, t), z + shift)
    assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert_close(da, db, rtol=1e-7, atol=1e-9)
    assert_close(da.sum(-1), torch.zeros(N).double(), rtol=0, atol=1e-12)


def test_cross_entropy_refuses():
    z = torch.randn(2, 3, 5)
    assert "(2, 3)" in message(softmax_cross_entropy, z,
                               torch.zeros(2, 4, dtype=torch.long))
    wrong = torch.full((2, 3), 5)
    assert "target 5" in message(softmax_cross_entropy, z, wrong)
    assert "0..4" in message(softmax_cross_entropy, z, -wrong)
    assert "long" in message(softmax_cross_entropy, z, torch.zeros(2, 3))
    whole = torch.zeros(2, 5, dtype=torch.long)  # would round the loss
    assert ".float()" in message(softmax_cross_entropy, whole, whole[:, 0])
    assert "V scores" in message(softmax_cross_entropy, z[0, 0, 0],
                                 torch.tensor(0))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_cross_entropy_takes_targets_of_any_integer_type(dtype):
    z, targets = torch.randn(3, 5), torch.tensor([4, 0, 2])
    assert_close(softmax_cross_entropy(z, targets.to(dtype)),
                 F.cross_entropy(z, targets))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (4,), (2, 9), (0,)])
def test_embedding_equals_torch_and_the_one_hot_product(dtype, shape):
    table = torch.randn(6, 3, dtype=dtype)
    tokens = torch.randint(6, shape)
    one_hot = F.one_hot(tokens, 6).to(dtype)
    ours = outputs_and_gradients(lambda w: embed(tokens, w), table)
    close = {} if dtype == torch.float32 else TIGHT
    for fn in (lambda w: F.embedding(tokens, w), lambda w: one_hot @ w):
        assert_close(ours, outputs_and_gradients(fn, table), **close)
    assert ours[0].shape == (*shape, 3)


@given(st.lists(st.integers(0, 4), max_size=20))
def test_embedding_gradient_counts_the_tokens(ids):
    table = torch.zeros(5, 2, requires_grad=True)
    embed(torch.tensor(ids, dtype=torch.int32), table).sum().backward()
    assert table.grad[:, 0].tolist() == [ids.count(i) for i in range(5)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_embedding_of_half_precision_sums_in_float32(dtype):
    table = torch.zeros(2, 3, dtype=dtype, requires_grad=True)
    embed(torch.zeros(4096, dtype=torch.long), table).sum().backward()
    assert table.grad.dtype == dtype
    assert table.grad.tolist() == [[4096.0] * 3, [0.0] * 3]


def test_embedding_refuses():
    table = torch.randn(5, 2)
    assert "id 5" in message(embed, torch.tensor([0, 5]), table)
    assert "id -1" in message(embed, torch.tensor([-1]), table)
    assert "float32" in message(embed, torch.tensor([1.0]), table)


# Mixture of experts


def mixture(seed=0, **changes):
    torch.manual_seed(seed)
    options = {"n_experts": 5, "top_k": 2, "activation": "swiglu"}
    return MixtureOfExperts(8, 16, **(options | changes)).double()


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_one_expert_is_a_dense_layer(renormalize, activation):
    moe = mixture(n_experts=1, top_k=1, renormalize=renormalize,
                  activation=activation)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    assert_close(outputs_and_gradients(moe, x),
                 outputs_and_gradients(moe.experts[0], x))


def test_equal_experts_are_a_dense_layer():
    moe = mixture()
    for expert in moe.experts:
        expert.load_state_dict(moe.experts[0].state_dict())
    x = torch.randn(7, 8, dtype=torch.float64)
    assert_close(outputs_and_gradients(moe, x),
                 outputs_and_gradients(moe.experts[0], x))


@given(st.integers(0, 12), st.integers(1, 6), st.integers(0, 99),
       st.booleans())
def test_mixture_is_its_formula(N, E, seed, renormalize):
    k = 1 + seed % E
    moe = mixture(seed, n_experts=E, top_k=k, renormalize=renormalize)
    x = torch.randn(N, 8, dtype=torch.float64)
    out = moe(x)
    routing = moe.routing
    assert routing.chosen.shape == routing.weights.shape == (N, k)
    assert_close(expert_load(routing).sum().item(), float(N > 0))
    for n in range(N):
        assert len(set(routing.chosen[n].tolist())) == k
        p = (moe.router.weight @ x[n]).softmax(0)
        best = p.topk(k)
        w = best.values / (best.values.sum() if renormalize else 1)
        wanted = sum(w[i] * moe.experts[best.indices[i]](x[n])
                     for i in range(k))
        assert_close(out[n], wanted)


def test_every_token_reaches_exactly_k_experts():
    moe, seen = mixture(top_k=3), []
    for expert in moe.experts:
        expert.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    x = torch.randn(4, 10, 8, dtype=torch.float64)
    moe(x)
    assert sum(len(rows) for rows in seen) == 3 * 40
    for row in x.reshape(-1, 8):
        assert sum((rows == row).all(-1).sum() for rows in seen) == 3


def test_tokens_do_not_influence_each_other():
    moe, x = mixture(), torch.randn(1, 6, 8, dtype=torch.float64)
    full = moe(x)
    for t in range(6):
        assert_close(moe(x[:, t:t + 1]), full[:, t:t + 1], **TIGHT)


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_mixture_gradients_by_finite_differences(top_k):
    moe = mixture(top_k=top_k, renormalize=False)
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    weight = moe.router.weight.detach().clone().requires_grad_()

    def call(x, weight):
        out = torch.func.functional_call(moe, {"router.weight": weight}, x)
        return out, load_balance_loss(moe.routing)

    assert gradcheck(call, (x, weight))


def test_a_renormalised_single_expert_teaches_the_router_nothing():
    x = torch.randn(6, 8, dtype=torch.float64)
    for renormalize, learns in ((True, False), (False, True)):
        moe = mixture(top_k=1, renormalize=renormalize)
        moe(x).square().sum().backward()
        assert (moe.router.weight.grad.abs().max() > 1e-9) == learns


def test_unused_experts_get_zero_gradients_and_not_none():
    moe = mixture(n_experts=16, top_k=1)
    moe(torch.randn(1, 8, dtype=torch.float64)).sum().backward()
    norms = [e.up_proj.weight.grad.norm() > 0 for e in moe.experts]
    assert sum(norms) == 1


def test_balance_loss_is_one_when_balanced_and_e_when_collapsed():
    E, N = 4, 8
    even = torch.arange(N)[:, None] % E
    uniform = torch.full((N, E), 1 / E)
    routing = Routing(uniform, even, torch.ones(N, 1))
    assert_close(expert_load(routing), torch.full((E,), 1 / E))
    assert_close(load_balance_loss(routing).item(), 1.0)
    sharp = F.one_hot(torch.zeros(N).long(), E).float()
    routing = Routing(sharp, torch.zeros(N, 1).long(), torch.ones(N, 1))
    assert_close(load_balance_loss(routing).item(), float(E))
    none = Routing(uniform[:0], even[:0], torch.ones(0, 1))
    assert load_balance_loss(none) == 0


def test_balance_loss_pushes_the_router_to_balance():
    torch.manual_seed(0)
    moe = mixture(n_experts=4, top_k=1).float()
    x = torch.randn(256, 8) + 2  # a common offset favours some experts
    optimizer = torch.optim.Adam(moe.router.parameters(), lr=0.05)
    worst = []
    for _ in range(100):
        moe(x)
        worst.append(expert_load(moe.routing).max().item())
        optimizer.zero_grad()
        load_balance_loss(moe.routing).backward()
        optimizer.step()
    assert worst[0] > 0.4 and worst[-1] < 0.35


@pytest.mark.parametrize("seed", [0, 1])
def test_router_collapses_without_the_loss_and_not_with_it(seed):
    """A part that all inputs share is what starts the collapse."""
    busiest = {}
    for aux in (0.0, 0.1):
        torch.manual_seed(seed)
        teacher = FeedForward(8, 32)
        moe = MixtureOfExperts(8, 16, n_experts=8, top_k=2)
        shared = 3 * torch.randn(8)
        optimizer = torch.optim.Adam(moe.parameters(), lr=0.01)
        for _ in range(120):
            x = torch.randn(128, 8) + shared
            loss = (moe(x) - teacher(x).detach()).square().mean()
            loss = loss + aux * load_balance_loss(moe.routing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        moe(torch.randn(2048, 8) + shared)
        busiest[aux] = 8 * expert_load(moe.routing).max().item()
    assert busiest[0.0] > 2.6 and busiest[0.1] < 2.0, busiest


def test_counts_of_parameters():
    moe = mixture(n_experts=8, top_k=2, bias=False)
    one = 3 * 8 * 16
    assert sum(p.numel() for p in moe.parameters()) == 8 * one + 8 * 8
    assert moe.active_parameters() == 2 * one + 8 * 8


def test_copies_and_files_leave_the_routing_behind():
    moe = mixture()
    x = torch.randn(3, 8, dtype=torch.float64)
    wanted = moe(x)
    for other in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe))):
        assert other.routing is None and moe.routing is not None
        assert_close(other(x), wanted)


def test_mixture_under_bfloat16():
    moe, x = mixture().float(), torch.randn(3, 4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = moe(x)
    assert out.dtype == torch.float32
    assert moe.routing.probs.dtype == torch.float32
    assert_close(out, moe(x), rtol=0.1, atol=0.1)
    half = copy.deepcopy(moe).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_mixture_replaces_a_feed_forward_in_the_model():
    model = GPT(GPTConfig(11, 8, d_model=16, n_layers=2, n_heads=2), seed=0)
    for block in model.blocks:
        block.ffn = MixtureOfExperts(16, 32, n_experts=4)
    tokens = torch.randint(11, (2, 8))
    logits = model(tokens)
    extra = sum(load_balance_loss(b.ffn.routing) for b in model.blocks)
    loss = softmax_cross_entropy(logits[:, :-1], tokens[:, 1:])
    (loss + 0.01 * extra).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert isinstance(model.blocks[0].ffn.router, Linear)


@pytest.mark.parametrize("top_k", [0, -1, 6])
def test_impossible_top_k(top_k):
    text = message(mixture, top_k=top_k)
    assert f"top_k={top_k}" in text and "n_experts=5" in text
