"""Encoders, decoders and both: who sees whom, whatever the config."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from minillm.attention import causal_mask, prefix_mask, reachability
from minillm.families import (
    DecoderBlock,
    Encoder,
    EncoderDecoder,
    check_mask_config,
    join_pairs,
    mask_tokens,
    masked_hidden,
    pad_batch,
    prefix_logits,
    source_mask,
)
from minillm.layers import IGNORE_INDEX
from minillm.transformer import GPT, GPTConfig, count_parameters

V, L = 29, 16  # vocabulary, context
CLOSE = dict(atol=1e-9, rtol=1e-7)


@st.composite
def configs(draw, plain=False):
    """Configs of every kind of norm, position and (not plain) head."""
    return GPTConfig(
        vocab_size=V, context_length=L, d_model=16, n_heads=4,
        n_layers=draw(st.integers(1, 2)),
        n_kv_heads=4 if plain else draw(st.sampled_from([4, 2, 1])),
        positions=draw(st.sampled_from(
            ["none", "sinusoidal", "learned", "rope"])),
        norm=draw(st.sampled_from(["layer", "rms"])),
        norm_position=draw(st.sampled_from(["pre", "post"])),
        activation=draw(st.sampled_from(["gelu", "swiglu"])),
        qk_norm=not plain and draw(st.booleans()), bias=draw(st.booleans()),
        tie_weights=draw(st.booleans()))


CFG = GPTConfig(vocab_size=V, context_length=L, d_model=16, n_heads=2,
                n_layers=2)


def build(kind, cfg=CFG, seed=1):
    """Make a model in float64 whose attention is far from uniform."""
    model = kind(cfg, seed=seed).eval().double()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(12)
    return model


def draw(*shape, seed=0):
    """Draw ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, V, shape, generator=generator)


def other(x):
    """Change every id to another one."""
    return (x + 1) % V


# ---- one block under any mask

@settings(max_examples=20, deadline=None)
@given(configs(), st.integers(1, L))
def test_the_causal_mask_gives_the_gpt(cfg, T):
    model, x = build(GPT, cfg), draw(2, T)
    assert_close(masked_hidden(model, x, causal_mask(T)), model.hidden(x),
                 **CLOSE)
    assert_close(prefix_logits(model, x, 0), model(x), **CLOSE)


@settings(max_examples=15, deadline=None)
@given(configs(), st.integers(0, 7))
def test_a_prefix_is_seen_by_all(cfg, prefix):
    model, x = build(GPT, cfg), draw(1, 7)
    found = reachability(
        lambda x: prefix_logits(model, x, prefix), x, other(x))
    assert torch.equal(found, prefix_mask(7, prefix))


def test_one_prefix_for_each_row():
    model, x = build(GPT), draw(3, 8)
    prefixes = torch.tensor([0, 3, 8])
    whole = prefix_logits(model, x, prefixes)
    for row, n in enumerate(prefixes.tolist()):
        assert_close(whole[row], prefix_logits(model, x[row:row + 1], n)[0],
                     **CLOSE)


@pytest.mark.parametrize("more, remedy", [
    ({"positions": "alibi"}, "choose 'learned'"),
    ({"sliding_window": 3}, "sliding_window=None")])
def test_causal_configs_are_refused_everywhere(more, remedy):
    fields = dict(vocab_size=V, context_length=L, d_model=16, n_heads=2,
                  n_layers=1) | more
    cfg = GPTConfig(**fields)
    for make in (check_mask_config, Encoder, EncoderDecoder):
        with pytest.raises(ValueError, match=remedy):
            make(cfg)
    with pytest.raises(ValueError, match=remedy):
        prefix_logits(GPT(cfg), draw(1, 3), 2)


@pytest.mark.parametrize("tokens", [
    draw(5), draw(1, 0), draw(1, L + 1), draw(1, 3).double(),
    torch.tensor([[V]])])
def test_tokens_that_do_not_fit(tokens):
    encoder, both = build(Encoder), build(EncoderDecoder)
    for run in (encoder, lambda x: both(x, draw(1, 2)),
                lambda x: both(draw(1, 2), x),
                lambda x: prefix_logits(encoder.gpt, x, 1)):
        with pytest.raises(ValueError):
            run(tokens)


# ---- batches

@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6),
                min_size=1, max_size=5))
def test_padding_can_be_taken_off(rows):
    tokens, lengths = pad_batch(rows)
    assert tokens.dtype == lengths.dtype == torch.int64
    assert tokens.shape == (len(rows), max(map(len, rows)))
    back = [t[:n].tolist() for t, n in zip(tokens, lengths.tolist())]
    assert back == rows
    assert (tokens == 0).sum() == tokens.numel() - lengths.sum()


@pytest.mark.parametrize("rows", [[], [[]], [[1], []]])
def test_empty_rows_are_refused(rows):
    with pytest.raises(ValueError, match="leave empty rows out"):
        pad_batch(rows)


def test_pairs_by_hand():
    tokens, targets, prefixes = join_pairs(
        [[5, 6, 7], [8]], [[9, 2], [9, 8, 2]], 1)
    assert tokens.tolist() == [[5, 6, 7, 1, 9], [8, 1, 9, 8, 0]]
    no = IGNORE_INDEX
    assert targets.tolist() == [[no, no, no, 9, 2], [no, 9, 8, 2, no]]
    assert prefixes.tolist() == [3, 1]
    for bad in (([[1]], []), ([[]], [[1]]), ([[1]], [[]]), ([], [])):
        with pytest.raises(ValueError):
            join_pairs(*bad, 1)


# ---- the encoder

@settings(max_examples=15, deadline=None)
@given(configs(), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_a_padded_row_is_the_sentence_alone(cfg, lengths):
    encoder = build(Encoder, cfg)
    rows = [draw(n, seed=i).tolist() for i, n in enumerate(lengths)]
    tokens, counts = pad_batch(rows)
    padded = encoder(tokens, counts)
    for row, ids in enumerate(rows):
        alone = encoder(torch.tensor([ids]))[0]
        assert_close(padded[row, :len(ids)], alone, **CLOSE)


@settings(max_examples=10, deadline=None)
@given(configs(), st.integers(1, 6))
def test_an_encoder_sees_all_but_padding(cfg, n):
    encoder, x = build(Encoder, cfg), draw(1, 6)
    found = reachability(
        lambda x: encoder(x, torch.tensor([n])), x, other(x))
    assert found[:, :n][:n].all() and not found[:n, n:].any()


def test_an_encoder_is_a_gpt_with_the_same_weights():
    encoder, gpt = Encoder(CFG, seed=4), GPT(CFG, seed=4)
    assert count_parameters(encoder) == count_parameters(CFG)
    for a, b in zip(encoder.parameters(), gpt.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("lengths", [
    [0, 1], [4, 1], [1], [1, 1, 1], [[1, 1]]])
def test_lengths_that_do_not_fit(lengths):
    with pytest.raises(ValueError):
        build(Encoder)(draw(2, 3), torch.tensor(lengths))


def test_source_mask_without_lengths_shows_all():
    assert source_mask(draw(2, 3), None).tolist() == [[[True] * 3]] * 2


# ---- masking

@settings(max_examples=30, deadline=None)
@given(st.floats(0, 1), st.integers(0, 99))
def test_only_targets_change(rate, seed):
    tokens = torch.randint(0, V, (6, 20),
                           generator=torch.Generator().manual_seed(seed))
    before = tokens.clone()
    inputs, targets = mask_tokens(
        tokens, 1, V, n_special=3, rate=rate,
        generator=torch.Generator().manual_seed(seed))
    asked = targets != IGNORE_INDEX
    assert torch.equal(tokens, before)
    assert torch.equal(inputs[~asked], tokens[~asked])
    assert torch.equal(targets[asked], tokens[asked])
    assert (tokens[asked] >= 3).all()
    changed = inputs[asked & (inputs != 1)]
    assert (changed >= 3).all() and (changed < V).all()


def test_the_three_shares_and_the_seed():
    tokens = torch.full((300, 300), 7)
    def run(seed):
        return mask_tokens(tokens, 0, 5000, rate=0.3,
                           generator=torch.Generator().manual_seed(seed))
    inputs, targets = run(0)
    n = (targets != IGNORE_INDEX).sum().item()
    assert abs(n / tokens.numel() - 0.3) < 0.01
    assert abs((inputs == 0).sum().item() / n - 0.8) < 0.02
    changed = (inputs != 0) & (inputs != 7)
    assert abs(changed.sum().item() / n - 0.1) < 0.02
    assert torch.equal(run(0)[0], inputs)
    assert not torch.equal(run(1)[0], inputs)


def test_rates_0_and_1():
    tokens = draw(4, 9)
    inputs, targets = mask_tokens(tokens, 1, V, n_special=3, rate=0.0)
    assert torch.equal(inputs, tokens) and (targets == IGNORE_INDEX).all()
    assert torch.equal(
        mask_tokens(tokens, 1, V, n_special=3, rate=1.0)[1], tokens)


@pytest.mark.parametrize("more", [
    {"rate": -0.1}, {"rate": 1.1}, {"rate": math.nan}, {"n_special": 1},
    {"n_special": V}])
def test_masking_that_cannot_be(more):
    with pytest.raises(ValueError):
        mask_tokens(draw(1, 3), 1, V, **{"n_special": 3} | more)


# ---- encoder and decoder

@settings(max_examples=15, deadline=None)
@given(configs(plain=True), st.integers(1, 5), st.integers(1, 5),
       st.integers(1, 5))
def test_target_is_causal_and_source_is_seen_but_padding(cfg, n, pad, T):
    model, S = build(EncoderDecoder, cfg), n + pad
    x = draw(1, S + T)
    found = reachability(
        lambda x: model(x[:, :S], x[:, S:], torch.tensor([n])), x, other(x))
    assert found[:, :n].all() and not found[:, n:S].any()
    if cfg.positions == "none" and T > 1:  # equal ids give equal values
        assert not (found[:, S:] & ~causal_mask(T)).any()
    else:
        assert torch.equal(found[:, S:], causal_mask(T))


@settings(max_examples=15, deadline=None)
@given(configs(plain=True), st.data())
def test_decoding_in_parts_is_decoding_at_once(cfg, data):
    cuts = sorted(data.draw(st.sets(st.integers(1, 7))))
    with torch.no_grad():
        check_parts(cfg, cuts)


def check_parts(cfg, cuts):
    """Decode 8 words in parts and at once; count what is kept."""
    model = build(EncoderDecoder, cfg)
    source, target = draw(3, 6), draw(3, 8, seed=2)
    memory = model.encode(source, torch.tensor([6, 2, 4]))
    whole = model.decode(target, memory)
    cache = model.decoder.new_cache(3, dtype=torch.float64)
    parts = [model.decode(part, memory, cache)
             for part in target.tensor_split(cuts, dim=1)]
    assert_close(torch.cat(parts, 1), whole, **CLOSE)
    n = cache.n_bytes // cache.n_slots * 8 + memory.n_bytes
    assert n == 2 * 8 * 3 * cfg.n_layers * (8 + 6) * 16


def test_cross_attention_is_the_readable_one():
    block = build(lambda cfg, seed: DecoderBlock(cfg)).double()
    x = torch.randn(2, 4, 16, dtype=torch.float64)
    states = torch.randn(2, 5, 16, dtype=torch.float64)
    mask = source_mask(draw(2, 5), torch.tensor([5, 2]))
    assert_close(block.look(x, block.keys_values(states), mask[:, None]),
                 block.cross(x, states, mask=mask), **CLOSE)


@pytest.mark.parametrize("position", ["pre", "post"])
def test_equal_to_torchs_decoder_layer(position):
    cfg = GPTConfig(vocab_size=V, context_length=L, d_model=16, n_heads=2,
                    n_layers=1, activation="relu", norm_position=position)
    block = DecoderBlock(cfg).double()
    theirs = nn.TransformerDecoderLayer(
        16, 2, 64, dropout=0.0, batch_first=True, dtype=torch.float64,
        norm_first=position == "pre")
    pairs = [(block.attn, theirs.self_attn),
             (block.cross, theirs.multihead_attn)]
    with torch.no_grad():
        for ours, them in pairs:
            projections = (ours.q_proj, ours.k_proj, ours.v_proj)
            them.in_proj_weight.copy_(
                torch.cat([p.weight for p in projections]))
            them.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
            them.out_proj.load_state_dict(ours.o_proj.state_dict())
    for ours, them in ((block.attn_norm, theirs.norm1),
                       (block.cross_norm, theirs.norm2),
                       (block.ffn_norm, theirs.norm3),
                       (block.ffn.up_proj, theirs.linear1),
                       (block.ffn.down_proj, theirs.linear2)):
        them.load_state_dict(ours.state_dict())
    x, states = torch.randn(2, 4, 16), torch.randn(2, 5, 16)
    x, states = x.double(), states.double()
    mask = source_mask(draw(2, 5), torch.tensor([5, 2]))
    got = block(x, source=block.keys_values(states),
                source_mask=mask[:, None])
    wanted = theirs(x, states, tgt_mask=~causal_mask(4),
                    memory_key_padding_mask=~mask[:, 0])
    assert_close(got, wanted, **CLOSE)


def test_one_embedding_and_every_weight_gets_a_gradient():
    for tie in (True, False):
        cfg = GPTConfig(vocab_size=V, context_length=L, d_model=16,
                        n_heads=2, n_layers=2, tie_weights=tie)
        model = EncoderDecoder(cfg, seed=0)
        assert model.encoder.gpt.tok_emb is model.decoder.tok_emb
        model(draw(2, 5), draw(2, 4)).logsumexp(-1).sum().backward()
        for name, p in model.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all(), name
        kept = model.state_dict()
        again = EncoderDecoder(cfg, seed=1)
        again.load_state_dict(kept)
        assert_close(again(draw(2, 5), draw(2, 4)),
                     model(draw(2, 5), draw(2, 4)))


@pytest.mark.parametrize("tie", [True, False])
def test_the_encoder_has_no_head_and_stays_tied(tie):
    cfg = replace(CFG, tie_weights=tie)
    model, again = (EncoderDecoder(cfg, seed=s) for s in (0, 1))
    assert not [n for n in model.state_dict() if n.startswith(
        "encoder.gpt.lm_head")]
    block = count_parameters(DecoderBlock(cfg))
    both = count_parameters(cfg) + 2 * block + L * 16 + 2 * 16
    assert count_parameters(model) == both
    again.load_state_dict(model.state_dict(), assign=True)
    decoder, table = again.decoder, again.decoder.tok_emb.weight
    assert again.encoder.gpt.tok_emb.weight is table
    assert (decoder.lm_head.weight is table) == tie
    assert torch.equal(again(draw(2, 5), draw(2, 4)),
                       model(draw(2, 5), draw(2, 4)))


@pytest.mark.parametrize("more, said", [
    ({"n_kv_heads": 1}, "n_kv_heads=1 for n_heads=2"),
    ({"qk_norm": True}, "qk_norm=True")])
def test_cross_attention_has_plain_heads(more, said):
    for make in (DecoderBlock, EncoderDecoder):
        with pytest.raises(ValueError, match=said):
            make(replace(CFG, **more))


@pytest.mark.parametrize("n", [2, 4])
def test_a_mask_for_each_row_of_tokens(n):
    model, x = build(GPT), draw(3, 8)
    with pytest.raises(ValueError, match=f"{n} rows for 3"):
        prefix_logits(model, x, torch.arange(n))
    with pytest.raises(ValueError, match="2 rows for 1"):
        masked_hidden(model, x[:1], prefix_mask(8, torch.tensor([1, 2])))
    one = torch.tensor([3])  # one for all
    assert_close(prefix_logits(model, x, one), prefix_logits(model, x, 3))


def test_gradients_in_float64():
    model = build(EncoderDecoder)
    source, target = draw(2, 4), draw(2, 3)
    memory = model.encode(source, torch.tensor([4, 2]))
    block = model.decoder.blocks[0]
    states = memory.states.detach().requires_grad_()
    x = torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, s: block(x, source=block.keys_values(s),
                           source_mask=memory.mask), (x, states))
    loss = model(source, target, torch.tensor([4, 2])).sum()
    loss.backward()
    assert model.encoder.gpt.tok_emb.weight.grad.isfinite().all()


def test_the_seed_decides_and_leaves_torch_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    a, b = EncoderDecoder(CFG, seed=1), EncoderDecoder(CFG, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    for p, q in zip(a.parameters(), b.parameters()):
        assert torch.equal(p, q)
    c = EncoderDecoder(CFG, seed=2)
    assert not torch.equal(a.decoder.tok_emb.weight,
                           c.decoder.tok_emb.weight)
    with torch.device("meta"):
        assert EncoderDecoder(CFG).decoder.tok_emb.weight.is_meta


def test_translate_writes_the_likeliest_word():
    model = build(EncoderDecoder)
    source, lengths = pad_batch([draw(5).tolist(), draw(3, seed=4).tolist()])
    rows = [[1], [1]]
    for _ in range(7):
        logits = model(source, torch.tensor(rows), lengths)[:, -1]
        rows = [[*r, i] for r, i in zip(rows, logits.argmax(-1).tolist())]
    model = model.float()
    for end in range(V):
        got = model.translate(source, lengths, start_id=1, end_id=end,
                              max_new_tokens=7)
        wanted = [r[1:r.index(end, 1)] if end in r[1:] else r[1:]
                  for r in rows]
        assert got == wanted
    cfg = replace(model.cfg, dropout=0.5)  # nor does it drop in training
    dropping = EncoderDecoder(cfg, seed=0).train()
    given = (source, lengths)
    calls = [dropping.translate(*given, start_id=1, end_id=2)
             for _ in range(4)]
    assert calls == [calls[0]] * 4 and dropping.training
    for n in (0, L + 1):
        with pytest.raises(ValueError, match="max_new_tokens"):
            model.translate(source, lengths, start_id=1, end_id=2,
                            max_new_tokens=n)


def test_a_source_for_each_target():
    model = build(EncoderDecoder)
    with pytest.raises(ValueError, match="one target row"):
        model(draw(2, 3), draw(3, 3))


def test_dropout_only_in_training():
    cfg = GPTConfig(vocab_size=V, context_length=L, d_model=16, n_heads=2,
                    n_layers=1, dropout=0.5)
    model, args = EncoderDecoder(cfg, seed=0), (draw(1, 4), draw(1, 3))
    assert not torch.equal(model(*args), model(*args))
    assert torch.equal(model.eval()(*args), model(*args))
