"""The model's parts equal torch's; its counts, errors and causality hold."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from minillm.attention import causal_mask, reachability
from minillm.transformer import (
    GPT,
    FeedForward,
    GPTConfig,
    LayerNorm,
    TransformerBlock,
    activation_function,
    count_parameters,
    init_weights,
    preset_fields,
)

TIGHT = {"rtol": 1e-10, "atol": 1e-12}
EXACT = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


def tiny(**changes):
    fields = {"vocab_size": 37, "context_length": 12, "d_model": 24,
              "n_layers": 3, "n_heads": 4}
    return GPTConfig(**(fields | changes))


def ids(B=2, T=9, V=37, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(V, (B, T), generator=g)


def outputs_and_gradients(fn, x):
    x = x.clone().requires_grad_()
    out = fn(x)
    g = torch.Generator().manual_seed(7)
    up = torch.randn(out.shape, dtype=out.dtype, generator=g)
    return [out, *torch.autograd.grad(out, [x], up)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_equals_torch(dtype, bias):
    ours = LayerNorm(16, bias=bias).to(dtype)
    ref = nn.LayerNorm(16, bias=bias).to(dtype)
    nn.init.normal_(ours.weight)
    ref.load_state_dict(ours.state_dict())
    x = 100 + 10 * torch.randn(2, 5, 16, dtype=dtype)
    assert_close(outputs_and_gradients(ours, x), outputs_and_gradients(ref, x))


def test_layer_norm_of_a_constant_vector_is_its_bias():
    norm = LayerNorm(8)
    nn.init.constant_(norm.bias, 0.5)
    out = norm(torch.full((1, 8), 3.0))
    assert_close(out, torch.full((1, 8), 0.5))


@pytest.mark.parametrize(("name", "formula"), [
    ("relu", lambda x: x * (x > 0)),
    ("gelu", lambda x: x / 2 * (1 + torch.erf(x / math.sqrt(2)))),
    ("gelu_tanh", lambda x: x / 2 * (1 + torch.tanh(
        math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
])
def test_activations_follow_their_formulas(name, formula):
    x = torch.linspace(-8, 8, 400, dtype=torch.float64)
    assert_close(outputs_and_gradients(activation_function(name), x),
                 outputs_and_gradients(formula, x), **TIGHT)


def test_feed_forward_is_its_formula_and_works_by_position():
    ffn = FeedForward(8, 20, activation="relu").double()
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    up = x @ ffn.up_proj.weight.T + ffn.up_proj.bias
    assert_close(ffn(x), up.relu() @ ffn.down_proj.weight.T
                 + ffn.down_proj.bias)
    assert torch.equal(reachability(ffn, x, x + 1), torch.eye(6).bool())


@pytest.mark.parametrize("position", ["pre", "post"])
def test_block_is_its_formula(position):
    block = TransformerBlock(tiny(norm_position=position)).double()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    if position == "pre":
        y = x + block.attn(block.attn_norm(x))
        wanted = y + block.ffn(block.ffn_norm(y))
    else:
        y = block.attn_norm(x + block.attn(x))
        wanted = block.ffn_norm(y + block.ffn(y))
    assert_close(block(x), wanted)


@pytest.mark.parametrize("name", list(preset_fields()))
def test_counts_of_presets(name):
    cfg = GPTConfig.preset(name)
    with torch.device("meta"):
        model = GPT(cfg, seed=0)
    assert model.tok_emb.weight.is_meta
    assert count_parameters(model) == count_parameters(cfg)
    assert count_parameters(cfg) == EXACT.get(name, count_parameters(model))


@pytest.mark.parametrize("changes", [
    {"tie_weights": False}, {"bias": False}, {"norm_position": "post"},
    {"d_ff": 7}, {"bias": False, "norm_position": "post", "d_ff": 50},
])
def test_counts_by_formula_for_every_option(changes):
    cfg = tiny(**changes)
    assert count_parameters(cfg) == count_parameters(GPT(cfg))


@pytest.mark.parametrize("changes", [
    {}, {"norm_position": "post"}, {"bias": False}, {"activation": "relu"},
    {"tie_weights": False}, {"n_heads": 1},
])
def test_model_is_causal_with_finite_gradients(changes):
    model = GPT(tiny(**changes), seed=0)
    x = ids(1, 12)
    assert torch.equal(reachability(model, x, (x + 1) % 37), causal_mask(12))
    F.cross_entropy(model(x)[0, :-1], x[0, 1:]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all()
               for p in model.parameters())


def test_logits_do_not_depend_on_what_follows_or_on_the_batch():
    model, x = GPT(tiny(), seed=0).double(), ids(3, 12)
    full = model(x)
    assert_close(model(x[:, :5]), full[:, :5])
    assert_close(model(x[1:2]), full[1:2])
    assert full.shape == (3, 12, 37)


def test_residual_stream_is_the_sum_of_all_writes():
    model, writes, seen = GPT(tiny(), seed=0).double(), [], []
    for block in model.blocks:
        for part in (block.attn, block.ffn):
            part.register_forward_hook(lambda m, i, out: writes.append(out))
    model.norm.register_forward_pre_hook(lambda m, i: seen.append(i[0]))
    x = ids()
    model(x)
    start = model.tok_emb(x) + model.pos_emb.weight[:9]
    assert_close(seen[0], start + sum(writes), **TIGHT)


def test_tied_weights_are_one_tensor_and_stay_one():
    model = GPT(tiny(), seed=0)
    assert model.lm_head.weight is model.tok_emb.weight
    model.double()
    model.load_state_dict(GPT(tiny(), seed=1).double().state_dict())
    assert model.lm_head.weight is model.tok_emb.weight
    untied = GPT(tiny(tie_weights=False), seed=0)
    assert untied.lm_head.weight is not untied.tok_emb.weight


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


def test_initialisation_has_the_sizes_of_gpt2():
    cfg = GPTConfig(500, 64, d_model=256, n_layers=8, n_heads=4)
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


def test_loss_at_the_start_is_that_of_knowing_nothing():
    cfg = GPTConfig(1000, 64, d_model=128, n_layers=4, n_heads=4)
    model, x = GPT(cfg, seed=0), ids(8, 65, 1000)
    logits = model(x[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten()).item()
    assert abs(loss - math.log(1000)) < 0.1


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_integer_types_give_the_same_logits(dtype):
    model = GPT(tiny(), seed=0)
    assert torch.equal(model(ids().to(dtype)), model(ids()))


@pytest.mark.parametrize(("tokens", "parts"), [
    (torch.zeros(1, 13, dtype=torch.long), ("13", "12", "tokens[:, -12:]")),
    (torch.zeros(5, dtype=torch.long), ("(5,)", "(B, T)", "tokens[None]")),
    (torch.zeros(1, 0, dtype=torch.long), ("(1, 0)", "at least one")),
    (torch.zeros(1, 4), ("float32", "int64", "tokens.long()")),
    (torch.tensor([[0, 37]]), ("37", "0..36", "tokenizer")),
    (torch.tensor([[0, -1]]), ("-1", "0..36", "tokenizer")),
])
def test_tokens_that_do_not_fit(tokens, parts):
    with pytest.raises(ValueError) as error:
        GPT(tiny(), seed=0)(tokens)
    assert all(p in str(error.value) for p in parts), str(error.value)


@pytest.mark.parametrize(("changes", "parts"), [
    ({"vocab_size": 0}, ("vocab_size=0", "at least 1")),
    ({"context_length": -5}, ("context_length=-5", "at least 1")),
    ({"d_model": 2.5}, ("d_model=2.5", "int")),
    ({"d_model": None}, ("d_model=None", "int")),
    ({"d_model": "64"}, ("d_model='64'", "int")),
    ({"n_layers": True}, ("n_layers=True", "int")),
    ({"d_ff": 0}, ("d_ff=0", "at least 1")),
    ({"n_heads": 5}, ("d_model=24", "n_heads=5", "try n_heads=4")),
    ({"dropout": 1.0}, ("dropout=1.0", "[0, 1)")),
    ({"dropout": "much"}, ("dropout='much'", "number")),
    ({"dropout": float("nan")}, ("dropout=nan", "[0, 1)")),
    ({"norm_eps": 0.0}, ("norm_eps=0.0", "1e-5")),
    ({"norm_position": "mid"}, ("'mid'", "'pre'", "'post'")),
    ({"activation": "swish"}, ("'swish'", "gelu_tanh")),
    ({"bias": 1}, ("bias=1", "True or False")),
    ({"tie_weights": "no"}, ("tie_weights='no'", "True or False")),
])
def test_config_refuses_and_names_the_remedy(changes, parts):
    with pytest.raises(ValueError) as error:
        tiny(**changes)
    assert all(p in str(error.value) for p in parts), str(error.value)


def test_config_round_trip_presets_and_unknown_fields():
    cfg = tiny(d_ff=50)
    assert GPTConfig.from_dict(dataclasses.asdict(cfg)) == cfg
    assert GPTConfig.preset("gpt2", d_model=96).d_ff == 4 * 96
    with pytest.raises(ValueError, match="gpt2-medium"):
        GPTConfig.preset("gpt5")
    with pytest.raises(ValueError, match="n_embd"):
        GPTConfig.preset("gpt2", n_embd=96)
    with pytest.raises(ValueError, match="missing.*vocab_size"):
        GPTConfig.from_dict({"d_model": 8})
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.d_model = 7


def test_dropout_acts_in_training_only():
    model, x = GPT(tiny(dropout=0.3), seed=0), ids()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    assert torch.equal(model(x), GPT(tiny(), seed=0)(x))


def test_model_on_the_meta_device_runs_without_storage():
    with torch.device("meta"):
        model = GPT(GPTConfig.preset("gpt2-xl"))
        out = model(torch.zeros(2, 16, dtype=torch.long))
    assert out.is_meta and out.shape == (2, 16, 50_257)
