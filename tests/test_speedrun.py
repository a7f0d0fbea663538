"""The speed-runs: attention written out, tables, two copies, recipes."""

import copy
import math
import os
import shlex
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm import speedrun
from minillm.kvcache import CausalSelfAttention
from minillm.optim import make_optimizer
from minillm.positions import rope_frequencies, rope_tables
from minillm.pretrain import TrainConfig, evaluate_loss
from minillm.sample import generate
from minillm.speedrun import (
    PlainAttention,
    ShakespeareRecipe,
    SpeedGPT,
    WorkingCopy,
    dry_run,
    five_minutes_recipe,
    gpt2_recipe,
    gpu_hours,
    hours_at,
    letters_of,
    ngram_ids,
    read_shakespeare,
    recipes,
    run_speedrun,
    shakespeare_10m_recipe,
    variants,
)
from minillm.train import quickstart_recipe
from minillm.transformer import GPT, GPTConfig, count_parameters

TEXT = "the owl sat by the old oak and the fox ran home. " * 60
SHAPE = GPTConfig(vocab_size=30, context_length=16, d_model=16, n_layers=2,
                  n_heads=2, bias=False)
TRAINING = TrainConfig(max_steps=6, batch_size=4, warmup_steps=1, lr=1e-2,
                       device="cpu", dtype="float32")
TINY = ShakespeareRecipe("tiny", "", SHAPE, TRAINING)


# Attention written out


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("rope", [False, True])
def test_plain_attention_is_its_parent(qk_norm, rope):
    torch.manual_seed(0)
    fused = CausalSelfAttention(12, 3, qk_norm=qk_norm).double()
    plain = PlainAttention(12, 3, qk_norm=qk_norm).double()
    plain.load_state_dict(fused.state_dict())
    rotation = None
    if rope:
        rotation = rope_tables(torch.arange(7), rope_frequencies(4),
                               torch.float64)
    results = []
    for layer in (fused, plain):
        x = torch.randn(2, 7, 12, dtype=torch.float64,
                        generator=torch.Generator().manual_seed(1))
        x.requires_grad_()
        out = layer(x, rotation)
        out.square().sum().backward()
        results.append((out, x.grad, layer.v_proj.weight.grad,
                        layer.q_proj.weight.grad))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(0, 8), st.integers(0, 99))
def test_plain_attention_is_causal(T, t, seed):
    layer = PlainAttention(8, 2)
    x = torch.randn(1, T, 8, generator=torch.Generator().manual_seed(seed))
    changed = x.clone()
    changed[:, min(t, T - 1):] += 1.0
    before = layer(x)[:, : min(t, T - 1)]
    torch.testing.assert_close(layer(changed)[:, : min(t, T - 1)], before)


@pytest.mark.parametrize("what", ["mask", "dropout", "groups"])
def test_plain_attention_leaves_the_rest_to_its_parent(what):
    options = {"n_kv_heads": 1} if what == "groups" else {}
    dropout = 0.5 if what == "dropout" else 0.0
    plain = PlainAttention(8, 2, dropout=dropout, **options)
    fused = CausalSelfAttention(8, 2, dropout=dropout, **options)
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(2, 5, 8)
    mask = torch.ones(5, 5, dtype=torch.bool).tril(0) if what == "mask" else (
        None)
    out = []
    for layer in (plain, fused):
        torch.manual_seed(3)
        out.append(layer(x, None, mask))
    torch.testing.assert_close(*out)


def test_plain_attention_in_low_precision():
    torch.manual_seed(0)
    layer = PlainAttention(16, 2)
    x = torch.randn(2, 12, 16)
    exact = layer(x)
    low = copy.deepcopy(layer).bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), exact, atol=0.02, rtol=0.05)


# Tables of n-grams


def slow_ids(row, order, vocab_size):
    row = [0] * (order - 1) + list(row)
    return [sum(row[i + order - 1 - b] * vocab_size**b for b in range(order))
            for i in range(len(row) - order + 1)]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=12),
       st.integers(1, 4))
def test_ngram_ids_are_exact_where_they_fit(row, order):
    tokens = torch.tensor([row])
    assert ngram_ids(tokens, order, 7, 7**order).tolist() == [
        slow_ids(row, order, 7)]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 50_000), min_size=1, max_size=12),
       st.integers(1, 5), st.integers(1, 1000))
def test_hashed_ids_are_rows_and_depend_on_the_ngram_alone(row, order, n):
    tokens = torch.tensor([row, row])
    ids = ngram_ids(tokens, order, 50_257, n)
    assert ids.shape == tokens.shape and ids.dtype == torch.int64
    assert 0 <= ids.min() and ids.max() < n
    assert torch.equal(ids[0], ids[1])
    later = torch.cat((torch.tensor([[9] * order]), tokens[:1]), 1)
    again = ngram_ids(later, order, 50_257, n)
    assert torch.equal(again[0, 2 * order - 1:], ids[0, order - 1:])


def test_hash_spreads():
    tokens = torch.randint(65, (1, 20_000),
                           generator=torch.Generator().manual_seed(0))
    ids = ngram_ids(tokens, 3, 65, 4096)
    used = len(ids.unique()) / 4096
    assert used > 0.97  # at random: 1 - exp(-4.9) = 0.993


@pytest.mark.parametrize("order, rows", [(0, 10), (2, 0)])
def test_ngram_ids_refuse(order, rows):
    with pytest.raises(ValueError, match="at least 1"):
        ngram_ids(torch.zeros(1, 3, dtype=torch.int64), order, 5, rows)


def test_int32_tokens_give_the_same_numbers():
    tokens = torch.randint(65, (2, 30))
    assert torch.equal(ngram_ids(tokens, 3, 65, 999),
                       ngram_ids(tokens.int(), 3, 65, 999))


# The model


@pytest.mark.parametrize("positions", ["learned", "alibi", "rope"])
def test_without_tables_it_is_a_gpt(positions):
    shape = replace(SHAPE, positions=positions)
    fast = SpeedGPT(shape, plain_attention=True, seed=4)
    usual = GPT(shape, seed=4)
    assert fast.state_dict().keys() == usual.state_dict().keys()
    tokens = torch.randint(30, (3, 16))
    torch.testing.assert_close(fast(tokens), usual(tokens))
    assert isinstance(fast.blocks[1].attn, PlainAttention)
    assert not isinstance(usual.blocks[1].attn, PlainAttention)


def test_tables_see_the_past_only():
    model = SpeedGPT(SHAPE, ngram_rows=(900, 50, 70), seed=0)
    for table in model.ngrams:
        torch.nn.init.normal_(table.weight)
    tokens = torch.randint(30, (1, 16))
    for t in range(1, 16):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % 30
        a, b = model(tokens), model(changed)
        torch.testing.assert_close(a[:, :t], b[:, :t])
        assert not torch.allclose(a[:, t], b[:, t])


def test_seed_decides_and_leaves_the_global_generator():
    state = torch.get_rng_state()
    a, b, c = (SpeedGPT(SHAPE, ngram_rows=(9,), seed=s) for s in (1, 1, 2))
    assert torch.equal(a.ngrams[0].weight, b.ngrams[0].weight)
    assert not torch.equal(a.ngrams[0].weight, c.ngrams[0].weight)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("rows", [(), (900, 50)])
def test_it_generates_as_without_a_cache(rows):
    model = SpeedGPT(SHAPE, ngram_rows=rows, seed=0, plain_attention=True)
    assert hasattr(model, "new_cache") == (not rows)
    prompt = torch.tensor([[1, 2, 3]])
    out = generate(model, prompt, 8, temperature=0.0)
    expected = prompt
    for _ in range(8):
        best = model(expected)[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat((expected, best), 1)
    assert torch.equal(out, expected)


# Two copies


def test_working_copy_in_float32_is_plain_training():
    models = [GPT(SHAPE, seed=0) for _ in range(2)]
    pair = WorkingCopy(models[1], torch.float32)
    optimizers = [make_optimizer(m, TRAINING) for m in models]
    x = torch.randint(30, (3, 16))
    for _ in range(3):
        models[0](x).square().mean().backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
        pair.copy(x).square().mean().backward()
        pair.collect()
        optimizers[1].step()
        pair.refresh()
    for p, q, r in zip(models[0].parameters(), models[1].parameters(),
                       pair.copy.parameters()):
        assert torch.equal(p, q) and torch.equal(q, r)


def test_small_changes_are_kept_in_the_exact_weights():
    model = torch.nn.Linear(4, 4)
    pair = WorkingCopy(model, torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
        pair.refresh()
        for _ in range(8):
            model.weight.add_(2.0**-10)  # below the copy's spacing at 1
            pair.refresh()
    assert torch.equal(pair.copy.weight.float(),
                       torch.full((4, 4), 1.0 + 2**-7))


# The runs


@pytest.mark.parametrize("changes", [
    {}, {"plain_attention": True, "working_copy": True},
    {"ngram_rows": (900, 64)},
], ids=["plain", "copy", "tables"])
def test_a_run_learns_and_repeats(changes):
    recipe = replace(TINY, **changes,
                     training=replace(TRAINING, max_steps=40))
    result = run_speedrun(TEXT, recipe, seed=1, progress=False)
    again = run_speedrun(TEXT, recipe, seed=1, progress=False)
    assert result.loss == again.loss < 2.2 < math.log(20)
    assert result.tokens == 40 * 4 * 16 == recipe.tokens
    assert result.seconds > 0 and result.cpu_seconds > 0
    assert result.parameters == count_parameters(result.model)
    other = run_speedrun(TEXT, recipe, seed=2, progress=False)
    assert other.loss != result.loss


def test_low_precision_run_is_near_the_exact_one():
    training = replace(TRAINING, max_steps=30)
    exact = run_speedrun(TEXT, replace(TINY, training=training))
    low = run_speedrun(TEXT, replace(
        TINY, training=replace(training, dtype="bfloat16"),
        plain_attention=True, working_copy=True))
    assert abs(low.loss - exact.loss) < 0.1
    assert {p.dtype for p in low.model.parameters()} == {torch.float32}


def test_the_loss_is_that_of_the_whole_tenth():
    result = run_speedrun(TEXT, TINY, progress=False)
    _, ids = letters_of(TEXT)
    tail = ids[int(0.9 * len(ids)):]
    assert result.targets == (len(tail) - 1) // 16 * 16
    total = 0.0
    for i in range(0, result.targets, 16):  # window by window, by hand
        x = torch.tensor(tail[i : i + 16])[None]
        y = torch.tensor(tail[i + 1 : i + 17])
        with torch.no_grad():
            total -= result.model(x)[0].log_softmax(-1)[
                range(16), y].sum().item()
    assert math.isclose(total / result.targets, result.loss, rel_tol=1e-5)


def test_the_tenth_is_never_trained_on():
    head, tail = TEXT[:2646], TEXT[2646:]
    assert int(0.9 * len(TEXT)) == 2646
    a = run_speedrun(TEXT, TINY, progress=False)
    b = run_speedrun(head + tail[::-1], TINY, progress=False)
    for p, q in zip(a.model.parameters(), b.model.parameters()):
        assert torch.equal(p, q)
    assert a.loss != b.loss


def test_the_curve_and_a_stopped_clock(monkeypatch):
    class Clock:  # each look at it takes a second, an evaluation a thousand
        now = 0.0

        def perf_counter(self):
            self.now += 1.0
            return self.now

        process_time = perf_counter

    def slow(*args, **options):
        clock.now += 1000.0
        return evaluate_loss(*args, **options)

    clock = Clock()
    monkeypatch.setattr(speedrun, "time", clock)
    monkeypatch.setattr(speedrun, "evaluate_loss", slow)
    result = run_speedrun(TEXT, TINY, eval_every=2, progress=False)
    assert len(result.curve) == 3
    assert result.curve[-1] == (result.seconds, result.cpu_seconds,
                                result.loss)
    seconds = [point[0] for point in result.curve]
    assert seconds == sorted(seconds) and result.seconds < 100
    assert clock.now > 3000


@pytest.mark.parametrize("text", ["", "abc", "x" * 160])
def test_too_short(text):
    with pytest.raises(ValueError, match="give a longer text"):
        run_speedrun(text, TINY, progress=False)


def test_divergence_is_named():
    wild = replace(TINY, training=replace(
        TRAINING, lr=1e30, grad_clip=math.inf, max_steps=20))
    with pytest.raises(FloatingPointError, match="lower lr"):
        run_speedrun(TEXT, wild, progress=False)


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_letters_round_trip(text):
    letters, ids = letters_of(text)
    assert "".join(letters[i] for i in ids) == text
    assert list(letters) == sorted(set(text))


def test_no_text(tmp_path, monkeypatch):
    monkeypatch.setenv("MINILLM_CACHE", str(tmp_path))
    for path in (None, tmp_path / "none.txt"):
        with pytest.raises(FileNotFoundError, match="minillm download shake"):
            read_shakespeare(path)
    path = tmp_path / "own.txt"
    path.write_text("häh", encoding="utf-8")
    assert read_shakespeare(path) == "häh"


# Recipes


def test_the_ladder():
    ladder = recipes()
    first = next(iter(ladder.values()))
    assert first.name == "baseline" and first.training.max_steps == 2000
    assert count_parameters(first.model) == 804_096
    for name, recipe in ladder.items():
        assert recipe.name == name and recipe.change
        assert recipe.model.context_length == 64
        assert recipe.training.device == "cpu"
    settings = [repr(replace(r, name="", change="")) for r in ladder.values()]
    assert len(set(settings)) == len(settings)


def test_every_rung_runs():
    for recipe in recipes().values():
        small = replace(recipe, training=replace(
            recipe.training, max_steps=2, batch_size=2))
        result = run_speedrun(TEXT, small, progress=False)
        assert math.isfinite(result.loss)


def test_shakespeare_10m():
    recipe = shakespeare_10m_recipe()
    assert recipe.tokens_per_step == 64 * 256
    assert recipe.tokens == 5000 * 64 * 256
    assert 10.6e6 < count_parameters(recipe.model) < 10.9e6


@pytest.mark.parametrize("micro", [1, 4, 32, 512])
def test_gpt2_recipe(micro):
    recipe = gpt2_recipe(micro_batch=micro)
    assert recipe.tokens_per_step == 2**19
    assert 10e9 <= recipe.tokens < 10e9 + 2**19
    assert count_parameters(recipe.model) == 124_439_808


@pytest.mark.parametrize("micro", [0, 3, 1024])
def test_gpt2_recipe_refuses(micro):
    with pytest.raises(ValueError, match="power of two"):
        gpt2_recipe(micro_batch=micro)


@pytest.mark.parametrize("recipe", [
    shakespeare_10m_recipe(), gpt2_recipe(checkpoint_blocks=True),
], ids=["shakespeare", "gpt2"])
def test_commands_say_what_the_recipe_says(recipe):
    words = shlex.split(recipe.command())
    assert words[:2] == ["minillm", "train"]
    pairs, key = {}, None
    for word in words[2:]:
        if word.startswith("--"):
            key = word
            pairs[key] = []
        else:
            pairs[key].append(word)
    for values, usual in (
        (asdict(recipe.training), asdict(TrainConfig())),
        (asdict(recipe.model), asdict(GPTConfig.preset(recipe.name))),
    ):
        for name, value in values.items():
            flag = "--" + name.replace("_", "-")
            if value == usual[name] or name == "vocab_size":
                continue
            if isinstance(value, bool):
                assert (flag in pairs) == value
            elif isinstance(value, tuple):
                assert [float(v) for v in pairs[flag]] == list(value)
            else:
                assert pairs[flag] == [str(value)]


def test_hours_are_arithmetic():
    recipe = gpt2_recipe()
    hours = gpu_hours(recipe, mfus=(0.25, 0.5))
    assert set(hours) >= {"T4", "H100 SXM"}
    for pair in hours.values():
        assert math.isclose(pair[0], 2 * pair[1])
    assert math.isclose(hours["A100 80GB SXM"][1],
                        recipe.flops / (312e12 * 0.5) / 3600)
    assert math.isclose(hours_at(recipe, 1e5), recipe.tokens / 1e5 / 3600)
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="above 0"):
            hours_at(recipe, bad)


def test_dry_run_goes_the_whole_way(tmp_path):
    small = replace(GPTConfig.preset("gpt2"), d_model=32, n_layers=2,
                    n_heads=2, n_kv_heads=2, d_ff=64, dropout=0.0,
                    vocab_size=512)
    done = dry_run(gpt2_recipe(), model=small, steps=3, context_length=16,
                   folder=tmp_path, progress=False)
    assert done.resumed and len(done.losses) == 3
    assert done.tokens == 3 * 2 * 16
    assert all(abs(loss - math.log(512)) < 0.5 for loss in done.losses)
    assert done.checkpoint_bytes > 12 * done.parameters
    assert (tmp_path / "train" / "manifest.json").is_file()
    with pytest.raises(ValueError, match="2 or more"):
        dry_run(gpt2_recipe(), steps=1)


@pytest.mark.skipif("MINILLM_SLOW" not in os.environ,
                    reason="4 GB and a minute; set MINILLM_SLOW=1")
def test_dry_run_of_the_real_shape():
    done = dry_run(gpt2_recipe(), progress=False)
    assert done.parameters == 124_439_808 and done.resumed
    assert all(abs(loss - math.log(50_257)) < 1.0 for loss in done.losses)


def test_seeds_change_the_batches():
    a, b = (run_speedrun(TEXT, TINY, seed=s, progress=False) for s in (0, 5))
    assert a.seed == 0 and b.seed == 5 and a.loss != b.loss
    assert np.isfinite(a.curve).all()


def test_five_minutes_is_a_quickstart_with_muon():
    recipe = five_minutes_recipe()
    assert recipe.training.optimizer == "muon"
    assert recipe.model.vocab_size == quickstart_recipe().model.vocab_size
    assert recipe.training.max_steps > quickstart_recipe().training.max_steps


def test_variants_change_one_thing_each():
    best = recipes()["best"]
    for name, recipe in variants().items():
        assert recipe.name == name and recipe != replace(
            best, name=recipe.name, change=recipe.change)
