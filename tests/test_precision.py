"""Devices and dtypes, loss scaling, accumulation, recomputation, memory."""

import json
import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minillm.accounting import MemoryMeter, saved_bytes
from minillm.precision import (
    LossScaler,
    accumulate_gradients,
    checkpointed,
    compiled,
    explain_choice,
    explain_out_of_memory,
    is_out_of_memory,
    pick_device,
    pick_dtype,
    training_peak,
)
from minillm.pretrain import IGNORE_INDEX, TrainConfig, cross_entropy
from minillm.transformer import GPT, GPTConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = GPTConfig(vocab_size=32, context_length=12, d_model=16, n_layers=2,
                  n_heads=2)  # fmt: skip


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def batch(rows, vocab=32, length=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab, (rows, length + 1), generator=g)
    return ids[:, :-1], ids[:, 1:].clone()


# --- devices ---


def on_gpu(monkeypatch, name, capability, hip=None, arch=""):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability",
                        lambda d: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    properties = type("Properties", (), {"gcnArchName": arch})
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda d: properties)


def on_cpu(monkeypatch, *units):
    for probe in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda p=probe: p in units,
                            raising=False)


def test_devices():
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    for bad in ("tpu", "", "cpu:x", "cuda:-1"):
        with pytest.raises(ValueError, match="not available.*'auto'"):
            pick_device(bad)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="cuda:3"):
            pick_device("cuda:3")


def test_a_gpu_beyond_the_last_is_refused(monkeypatch):
    on_gpu(monkeypatch, "NVIDIA A100", (8, 0))
    for name in ("cuda", "cuda:0", "cuda:1"):
        assert pick_device(name) == torch.device(name)
    with pytest.raises(ValueError, match="cuda:2.*not available"):
        pick_device("cuda:2")


def test_the_order_of_devices(monkeypatch):
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"),
                                (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda x=cuda: x)
        monkeypatch.setattr(torch.backends.mps, "is_available",
                            lambda x=mps: x)
        assert pick_device("auto").type == expected


@pytest.mark.parametrize("name, capability, dtype, why", [
    ("Tesla P100", (6, 0), torch.float32, "no matrix units for 16 bits"),
    ("GeForce GTX 1080", (6, 1), torch.float32, "no matrix units for 16 bits"),
    ("Tesla V100", (7, 0), torch.float16, "no bfloat16 units"),
    ("Tesla T4", (7, 5), torch.float16, "no bfloat16 units, so float16 with "
     "loss scaling"),
    ("NVIDIA A100", (8, 0), torch.bfloat16, "has units for bfloat16"),
    ("NVIDIA L4", (8, 9), torch.bfloat16, "capability 8.9"),
    ("NVIDIA H100", (9, 0), torch.bfloat16, "so bfloat16"),
    ("NVIDIA B200", (10, 0), torch.bfloat16, "so bfloat16"),
])  # fmt: skip
def test_what_a_gpu_gets(monkeypatch, name, capability, dtype, why):
    on_gpu(monkeypatch, name, capability)
    assert pick_dtype("auto", CUDA) == dtype
    line = explain_choice(CUDA, dtype)
    assert line.startswith("cuda: ") and name in line and why in line
    assert "\n" not in line


def test_bfloat16_on_a_t4_warns_that_it_is_emulated(monkeypatch):
    on_gpu(monkeypatch, "Tesla T4", (7, 5))
    with pytest.warns(UserWarning, match="Tesla T4.*emulated.*float16"):
        assert pick_dtype("bfloat16", CUDA) == torch.bfloat16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pick_dtype("float32", CUDA), pick_dtype("float16", CUDA)
        on_gpu(monkeypatch, "NVIDIA A100", (8, 0))
        assert pick_dtype("bfloat16", CUDA) == torch.bfloat16
    assert "needs no scaling" in explain_choice(CUDA, torch.float16)
    assert "would be faster" in explain_choice(CUDA, torch.float32)


def test_rocm_goes_by_the_architecture(monkeypatch):
    for arch, dtype in (("gfx90a:sramecc+", torch.bfloat16),
                        ("gfx942", torch.bfloat16),
                        ("gfx1100", torch.bfloat16),
                        ("gfx906", torch.float32),
                        ("gfx1030", torch.float32)):  # fmt: skip
        on_gpu(monkeypatch, "AMD GPU", (9, 0), hip="6.2", arch=arch)
        assert pick_dtype("auto", CUDA) == dtype
        assert arch.partition(":")[0] in explain_choice(CUDA, dtype)


def test_cpu_and_mps(monkeypatch):
    for units, dtype in (
        ((), torch.float32),
        (("_is_avx512_bf16_supported",), torch.bfloat16),
        (("_is_amx_tile_supported",), torch.bfloat16),
    ):
        on_cpu(monkeypatch, *units)
        assert pick_dtype("auto", CPU) == dtype
        assert f"so {str(dtype)[6:]}" in explain_choice("cpu", dtype)
    on_cpu(monkeypatch)
    assert "emulated" in explain_choice(CPU, torch.bfloat16)
    assert pick_dtype("float16", CPU) == torch.float16  # slow, and allowed
    assert "loss scaling as asked" in explain_choice(CPU, torch.float16)
    mps = torch.device("mps")
    assert pick_dtype("auto", mps) == torch.float32
    for name in ("float16", "bfloat16", "float32"):
        dtype = pick_dtype(name, mps)
        assert dtype == getattr(torch, name)
        assert explain_choice(mps, dtype).startswith(f"mps: {name}")
    with pytest.raises(ValueError, match="float8"):
        pick_dtype("float8", CPU)
    with pytest.raises(ValueError, match="int64"):
        explain_choice(CPU, torch.int64)


# --- loss scaling ---


def scaled_run(scaler, steps, fused=False):
    """Train a small model; `scaler` is ours or torch's."""
    model = GPT(SMALL, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    scales, taken = [], []
    for i in range(steps):
        x, y = batch(4, seed=i)
        with torch.autocast("cpu", torch.float16):
            loss = cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        if i in (5, 6, 20):  # as an unlucky batch would
            model.tok_emb.weight.grad[0, 0] = (math.inf, math.nan)[i % 2]
        before = model.norm.weight.clone()
        scales.append(scaler.get_scale())
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        taken.append(not torch.equal(before, model.norm.weight))
    return model, scales, taken


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("init_scale", [2.0**30, 2.0**4])
def test_the_scaler_is_torchs(init_scale, fused):
    options = dict(init_scale=init_scale, growth_interval=7)
    ours, theirs = (scaled_run(s, 40, fused) for s in (
        LossScaler(**options), torch.amp.GradScaler("cpu", **options)))
    assert ours[1] == theirs[1] and ours[2] == theirs[2]
    assert ours[2].count(False) >= 3  # steps were skipped
    assert len(set(ours[1])) >= 3  # and the scale grew and fell
    for p, q in zip(ours[0].parameters(), theirs[0].parameters()):
        assert torch.equal(p, q)


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 9))
def test_the_scale_follows_torchs_rule(overflows, interval):
    p = nn.Parameter(torch.ones(3))
    ours = LossScaler(growth_interval=interval, min_scale=2.0**-70)
    theirs = torch.amp.GradScaler("cpu", growth_interval=interval)
    weights = {}
    for scaler in (ours, theirs):
        p.data.fill_(1.0)
        optimizer = torch.optim.SGD([p], lr=0.125)
        for bad in overflows:
            scaler.scale(p.sum() * (math.inf if bad else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        weights[scaler] = p.tolist()
    assert weights[ours] == weights[theirs]
    assert ours.get_scale() == theirs.get_scale()
    assert ours.n_skipped == sum(overflows)


def test_the_scaler_resumes():
    whole = LossScaler(init_scale=2.0**20, growth_interval=5)
    half = LossScaler(init_scale=2.0**20, growth_interval=5)
    p = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([p], lr=0.1)

    def steps(scaler, flags):
        for bad in flags:
            scaler.scale(p.sum() * (math.nan if bad else 1.0)).backward()
            scaler.step(optimizer), scaler.update(), optimizer.zero_grad()

    flags = [1, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0]
    steps(whole, flags), steps(half, flags[:8])
    other = LossScaler(growth_interval=5)
    other.load_state_dict(json.loads(json.dumps(half.state_dict())))
    steps(other, flags[8:])
    assert other.state_dict() == whole.state_dict()
    with pytest.raises(ValueError, match="state_dict"):
        other.load_state_dict({"scale": 1.0})


def test_a_disabled_scaler_passes_through():
    p = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([p], lr=1.0)
    scaler = LossScaler(enabled=False)
    loss = (p * p).sum()
    assert scaler.scale(loss) is loss and not scaler.is_enabled()
    loss.backward()
    scaler.unscale_(optimizer)
    assert scaler.step(optimizer) is True
    scaler.update()
    assert p.tolist() == [-1.0, -1.0] and scaler.get_scale() == 1.0


def test_misuse_of_the_scaler():
    for bad in ({"init_scale": 0.0}, {"init_scale": math.inf},
                {"growth_factor": 1.0}, {"backoff_factor": 1.0},
                {"backoff_factor": 0.0}, {"growth_interval": 0},
                {"min_scale": 0.0}, {"init_scale": 0.5, "min_scale": 1.0},
                {"init_scale": math.nan}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(bad))):
            LossScaler(**bad)
    p = nn.Parameter(torch.ones(2))
    optimizer, scaler = torch.optim.SGD([p], lr=1.0), LossScaler()
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="without a step"):
        scaler.update()
    scaler.scale(p.sum()).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="twice"):
        scaler.unscale_(optimizer)


def test_gradients_that_no_scale_mends_end_the_run():
    p = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([p], lr=1.0)
    scaler = LossScaler(init_scale=4.0, min_scale=1.0)
    with pytest.raises(FloatingPointError, match="lower lr"):
        for _ in range(5):
            scaler.scale(p.sum() * math.nan).backward()
            assert scaler.step(optimizer) is False
            scaler.update()
    assert p.tolist() == [1.0, 1.0] and scaler.n_skipped == 3


# --- accumulation ---


def cut(x, y, sizes):
    return list(zip(x.split(sizes), y.split(sizes)))


@given(st.lists(st.integers(0, 12), min_size=4, max_size=4),
       st.sampled_from([(1, 3), (2, 2), (1, 1, 2), (1, 1, 1, 1)]))
def test_accumulation_is_the_full_batch(lengths, sizes):
    """Rows of unequal length, micro-batches without a target included."""
    x, y = batch(4)
    for row, n in enumerate(lengths):
        y[row, n:] = IGNORE_INDEX
    model = GPT(SMALL, seed=0)
    loss = cross_entropy(model(x), y)
    loss.backward()
    full = gradients(model)
    model.zero_grad()
    ours, n_targets = accumulate_gradients(model, cut(x, y, sizes))
    assert n_targets == sum(lengths)
    assert ours == pytest.approx(loss.item(), abs=1e-6)
    for name, g in gradients(model).items():
        torch.testing.assert_close(g, full[name], rtol=0, atol=1e-6)


def test_accumulation_in_float64():
    x, y = batch(4)
    y[0, 1:] = y[2:] = IGNORE_INDEX  # two of four rows without a target
    model = GPT(SMALL, seed=0).double()

    def loss(batches):
        """Sums over the number of targets, without the cast to float32."""
        count = (y != IGNORE_INDEX).sum()
        return sum(nn.functional.cross_entropy(
            model(a).flatten(0, 1), b.flatten(), reduction="sum") / count
            for a, b in batches)

    loss([(x, y)]).backward()
    full = gradients(model)
    model.zero_grad()
    loss(cut(x, y, [1, 1, 2])).backward()
    for name, g in gradients(model).items():
        torch.testing.assert_close(g, full[name], rtol=1e-12, atol=1e-15)
    model.zero_grad()
    accumulate_gradients(model, cut(x, y, [1, 1, 2]))  # through float32
    for name, g in gradients(model).items():
        torch.testing.assert_close(g, full[name], rtol=0, atol=1e-6)


def test_accumulation_adds_to_gradients_and_scales():
    x, y = batch(4)
    model = GPT(SMALL, seed=0)
    accumulate_gradients(model, [(x, y)])
    once = gradients(model)
    accumulate_gradients(model, [(x, y)])
    for name, g in gradients(model).items():
        torch.testing.assert_close(g, 2 * once[name])
    model.zero_grad()
    scaler = LossScaler(init_scale=8.0)
    loss, _ = accumulate_gradients(model, [(x, y)], scaler=scaler)
    for name, g in gradients(model).items():
        torch.testing.assert_close(g, 8 * once[name])
    assert loss < 5  # the loss itself is not scaled
    with pytest.raises(ValueError, match="at least one"):
        accumulate_gradients(model, [])


# --- recomputation ---


def forward(model, tokens, wrap):
    x = model.embed(tokens)
    for block in model.blocks:
        x = wrap(block, x)
    return model.lm_head(model.norm(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_leaves_gradients_bit_for_bit(dtype):
    cfg = GPTConfig(32, 12, 16, 3, 2, dropout=0.3)
    x, y = batch(4)
    found = []
    for wrap in (lambda block, x: block(x), checkpointed):
        model = GPT(cfg, seed=0).train()
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = forward(model, x, wrap)
        cross_entropy(logits, y).backward()
        found.append((logits, gradients(model), torch.get_rng_state()))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][2], found[1][2])  # dropout goes on as before
    for name, g in found[0][1].items():
        assert torch.equal(g, found[1][1][name]), name


def test_the_models_switch():
    cfg = GPTConfig(32, 12, 16, 3, 2, dropout=0.3)
    x, y = batch(4)
    found = {}
    for on in (False, True):
        model = GPT(cfg, seed=0).train()
        model.checkpoint_blocks = on
        torch.manual_seed(1)
        cross_entropy(model(x), y).backward()
        found[on] = gradients(model)
        kept = saved_bytes(lambda m=model: cross_entropy(m(x), y),
                           list(model.parameters()))
        found[on, "kept"] = kept
        model.eval()
        with torch.no_grad():
            cache = model.new_cache(4)
            torch.testing.assert_close(model(x, cache=cache), model(x))
    assert found[True, "kept"] < found[False, "kept"] / 2
    for name, g in found[False].items():
        assert torch.equal(g, found[True][name]), name


def test_checkpointed_keeps_the_input_only():
    block = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8))
    x = torch.randn(16, 8, requires_grad=True)
    weights = list(block.parameters())
    plain = saved_bytes(lambda: block(x).sum(), weights)
    less = saved_bytes(lambda: checkpointed(block, x).sum(), weights)
    assert plain > 5 * less and less == x.numel() * 4


# --- compiling ---


def test_compiling_falls_back_with_a_reason(monkeypatch):
    model = nn.Linear(3, 2)

    def broken(*args, **kwargs):
        raise RuntimeError("no C++ compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda m: broken)
    run = compiled(model)
    x = torch.ones(1, 3)
    with pytest.warns(UserWarning, match="no C.. compiler$"):
        out = run(x)
    assert torch.equal(out, model(x)) and "no C++ compiler" in run.reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        assert torch.equal(run(x), out)
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(UserWarning, match="failed"):
        run = compiled(model)
    assert torch.equal(run(x), out) and run.reason
    assert run.model is model


def test_a_models_own_error_is_not_the_compilers(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda m: m)
    run = compiled(GPT(SMALL, seed=0))
    with pytest.raises(ValueError, match="vocab_size"):
        run(torch.full((1, 4), 99))
    assert run.reason == ""
    with pytest.raises(MemoryError):  # nor is a full memory
        def full(*args):
            raise MemoryError
        monkeypatch.setattr(torch, "compile", lambda m: full)
        compiled(nn.Linear(1, 1))(torch.ones(1, 1))


# --- memory ---


def peak_of(cfg, train_cfg, keep=None):
    """Measure a step, the second one, by every storage it makes."""
    def train_step(model, optimizer):
        parts = []
        size = (train_cfg.batch_size, cfg.context_length + 1)
        for _ in range(train_cfg.grad_accum_steps):
            ids = torch.randint(cfg.vocab_size, size)
            parts.append((ids[:, :-1], ids[:, 1:]))
        wrap = checkpointed if train_cfg.checkpoint_blocks else (
            lambda block, x: block(x))
        accumulate_gradients(lambda x: forward(model, x, wrap), parts,
                             dtype=getattr(torch, train_cfg.dtype))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    with MemoryMeter() as meter:
        model = GPT(cfg, seed=0)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for _ in range(2):
            train_step(model, optimizer)
    return meter.peak


@pytest.mark.parametrize("vocab, width, layers, rows, steps, on, dtype", [
    (512, 64, 3, 8, 1, False, "float32"),
    (512, 64, 3, 8, 1, True, "float32"),
    (64, 64, 6, 8, 1, True, "float32"),
    (64, 64, 6, 8, 1, True, "bfloat16"),
    (64, 64, 6, 8, 3, True, "float32"),
    (64, 64, 6, 8, 3, False, "float32"),
    (64, 64, 6, 8, 3, False, "bfloat16"),
    (2048, 32, 2, 1, 1, True, "float32"),
    (2048, 32, 2, 1, 4, False, "float32"),
])  # fmt: skip
def test_the_peak_is_predicted(vocab, width, layers, rows, steps, on, dtype):
    cfg = GPTConfig(vocab, 64, width, layers, 2)
    train_cfg = TrainConfig(batch_size=rows, grad_accum_steps=steps,
                            checkpoint_blocks=on, dtype=dtype, device="cpu")
    found = peak_of(cfg, train_cfg)
    assert training_peak(cfg, train_cfg) == pytest.approx(found, rel=0.1)


def test_muon_keeps_one_moment_of_the_matrices():
    cfg = GPTConfig(64, 64, 64, 6, 2)
    plain = training_peak(cfg, TrainConfig(dtype="float32"))
    muon = training_peak(cfg, TrainConfig(dtype="float32", optimizer="muon"))
    assert 0 < plain - muon < 4 * 6 * 13 * 64**2


def test_what_running_out_of_memory_looks_like():
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**48)  # a petabyte
    assert is_out_of_memory(found.value)
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.9 GB)"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried"),
        MemoryError(), OSError(12, "Cannot allocate memory"),
    ):  # fmt: skip
        assert is_out_of_memory(error)
    for error in (
        RuntimeError("shapes do not match"), ValueError("out of memory"),
        OSError(28, "No space left on device"), KeyboardInterrupt(),
    ):  # fmt: skip
        assert not is_out_of_memory(error)


def test_advice_for_a_full_memory():
    model_cfg = GPTConfig.preset("gpt2", dropout=0.0)
    train_cfg = TrainConfig(batch_size=12, grad_accum_steps=5, device="cpu",
                            dtype="float32")  # fmt: skip
    error = torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")
    text = explain_out_of_memory(error, model_cfg, train_cfg)
    assert max(map(len, text.splitlines())) <= 79
    assert text.startswith("out of memory: CUDA out of memory. Tried\n")
    for part in ("batch_size=6, grad_accum_steps=10", "context_length=512",
                 "checkpoint_blocks=True", "batch_size=1, grad_accum_steps=60",
                 "bfloat16", "weights 498 MB"):  # fmt: skip
        assert part in text, part
    assert "dropout" not in text
    wet = GPTConfig.preset("gpt2")
    assert "dropout=0.0" in explain_out_of_memory(error, wet, train_cfg)


@pytest.mark.parametrize("B, cut", [(2, 1), (9, 3), (7, 1), (16, 8)])
def test_advice_keeps_the_rows_of_a_step(B, cut):
    cfg = TrainConfig(batch_size=B, device="cpu", dtype="float32")
    text = explain_out_of_memory(MemoryError(), SMALL, cfg)
    assert f"batch_size={cut}, grad_accum_steps={B // cut}" in text
    assert text.startswith("out of memory: MemoryError\n")


def test_advice_when_nothing_is_left_to_cut():
    tiny = GPTConfig(4096, 1, 64, 1, 1)
    cfg = TrainConfig(batch_size=1, checkpoint_blocks=True, dtype="bfloat16")
    text = explain_out_of_memory(MemoryError(), tiny, cfg)
    assert "batch_size=1," not in text.partition("What needs less:")[2]
    assert text.endswith("fewer or narrower layers")


def test_advice_says_nothing_twice():
    big = GPTConfig.preset("gpt2", dropout=0.0)
    for B, on, n in ((1, False, 0), (2, True, 1), (2, False, 2), (4, True, 2)):
        cfg = TrainConfig(batch_size=B, checkpoint_blocks=on, device="cpu",
                          dtype="float32")  # fmt: skip
        text = explain_out_of_memory(MemoryError(), big, cfg)
        assert text.partition("What needs less:")[2].count("batch_size=") == n
    small = GPTConfig.preset("gpt2", dropout=0.0, context_length=64)
    cfg = TrainConfig(batch_size=1, device="cpu", dtype="float32")
    text = explain_out_of_memory(MemoryError(), small, cfg)
    assert "context_length" not in text  # would change next to nothing
    assert text.endswith("fewer or narrower layers")
    muon = TrainConfig(batch_size=1, device="cpu", dtype="float32",
                       optimizer="muon")  # fmt: skip
    less = explain_out_of_memory(MemoryError(), small, muon)
    assert "optimizer 650 MB" in less and "optimizer 99" in text


def test_advice_for_a_t4(monkeypatch):
    on_gpu(monkeypatch, "Tesla T4", (7, 5))
    cfg = TrainConfig(batch_size=2, dtype="float32", device="cuda")
    dry = GPTConfig.preset("gpt2", dropout=0.0)
    text = explain_out_of_memory(MemoryError(), dry, cfg)
    assert "float16" in text and "bfloat16" not in text
    big = GPTConfig.preset("gpt2")
    text = explain_out_of_memory(MemoryError(), big, cfg)
    assert "dropout" not in text  # its kernels keep no T x T
