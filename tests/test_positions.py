"""Positions: equal to transformers, functions of distance, loud when wrong."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from minillm.positions import (
    alibi_bias,
    alibi_slopes,
    apply_rope,
    convert_rope,
    rope_frequencies,
    rope_tables,
    scale_frequencies,
    sinusoidal_embedding,
)

TIGHT = {"rtol": 1e-12, "atol": 1e-12}
LAYOUTS = ("half", "interleaved")
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
dims = st.integers(1, 16).map(lambda n: 2 * n)
seeds = st.integers(0, 10_000)
layouts = st.sampled_from(LAYOUTS)


def randn(*shape, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=dtype, generator=g)


def exact_tables(positions, head_dim, theta=10_000.0):
    """cos and sin in float64, for tests that want 1e-12."""
    i = torch.arange(0, head_dim, 2, dtype=torch.float64)
    angles = positions[..., None].double() / theta ** (i / head_dim)
    return angles.cos(), angles.sin()


def turned_plainly(x, cos, sin, layout):
    """The definition, pair by pair, with nothing but indexing."""
    K = x.shape[-1]
    out = x.clone()
    for i in range(K // 2):
        p, q = (i, i + K // 2) if layout == "half" else (2 * i, 2 * i + 1)
        c, s = cos[..., i], sin[..., i]
        out[..., p] = x[..., p] * c - x[..., q] * s
        out[..., q] = x[..., q] * c + x[..., p] * s
    return out


class Kernels(TorchDispatchMode):
    """Count the operations that compute something; views are free."""

    VIEWS = {"view", "_unsafe_view", "slice", "select", "transpose", "alias",
             "unsqueeze", "detach", "as_strided", "split", "_to_copy"}

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in self.VIEWS:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


# --- sinusoidal -----------------------------------------------------------


def test_sinusoidal_is_the_papers_formula():
    out = sinusoidal_embedding(torch.arange(50), 12)
    for t in (0, 1, 7, 49):
        for i in range(6):
            angle = t / 10_000 ** (2 * i / 12)
            assert math.isclose(out[t, 2 * i], math.sin(angle), abs_tol=1e-5)
            assert math.isclose(out[t, 2 * i + 1], math.cos(angle),
                                abs_tol=1e-5)


@given(d=dims, shift=st.integers(0, 40), t=st.integers(0, 200))
def test_a_shift_is_the_same_linear_map_everywhere(d, shift, t):
    here, there, by = sinusoidal_embedding(torch.tensor([t, t + shift, shift]),
                                           d)
    sin, cos = by.view(-1, 2).T
    s, c = here.view(-1, 2).T
    moved = torch.stack((s * cos + c * sin, c * cos - s * sin), dim=-1)
    assert_close(moved.flatten(), there, rtol=0, atol=1e-4)


def test_sinusoidal_shapes_and_dtype():
    assert sinusoidal_embedding(torch.zeros(2, 3, dtype=torch.int64),
                                8).shape == (2, 3, 8)
    assert sinusoidal_embedding(torch.arange(0), 8).shape == (0, 8)
    torch.set_default_dtype(torch.float64)
    assert sinusoidal_embedding(torch.arange(3), 8).dtype == torch.float32
    assert rope_frequencies(8).dtype == torch.float32
    assert alibi_slopes(6).dtype == torch.float32


# --- ALiBi ----------------------------------------------------------------


@pytest.mark.parametrize("n_heads", [*range(1, 41), 64, 100, 112])
def test_alibi_equals_bloom(n_heads):
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    T = 9
    theirs = bloom.build_alibi_tensor(torch.ones(1, T), n_heads,
                                      torch.float32)  # (H, 1, T)
    slopes = alibi_slopes(n_heads)
    assert_close(slopes, theirs[:, 0, 1], rtol=1e-6, atol=0)
    at = torch.arange(T)
    ours = alibi_bias(slopes, at, at)
    # Bloom leaves out what is the same for all keys of a query
    scores = randn(n_heads, T, T, dtype=torch.float32)
    future = at > at[:, None]
    a, b = ((scores + bias).masked_fill(future, -torch.inf).softmax(-1)
            for bias in (ours, theirs))
    assert_close(a, b)


@given(n=st.integers(1, 130))
def test_alibi_slopes_fall_within_each_row(n):
    slopes = alibi_slopes(n)
    power = 2 ** int(math.log2(n))
    assert slopes.shape == (n,)
    assert (slopes > 0).all() and (slopes < 1).all()
    assert math.isclose(slopes[power - 1], 2**-8)
    assert (slopes[:power].diff() < 0).all()
    assert (slopes[power:].diff() < 0).all()
    assert len(set(slopes.tolist())) == n


def test_alibi_bias_of_a_batch_is_that_of_its_rows():
    slopes = alibi_slopes(4)
    q = torch.tensor([[5, 6], [0, 1]])
    k = torch.tensor([[3, 4, 5, 6], [0, 1, 2, 3]])
    both = alibi_bias(slopes, q, k)  # (B, H, T, S)
    assert both.shape == (2, 4, 2, 4)
    for b in range(2):
        assert_close(both[b], alibi_bias(slopes, q[b], k[b]))
    assert both[0, 0, 1].tolist() == [-0.75, -0.5, -0.25, 0.0]
    assert (both[0, :, 0, 2] == 0).all()


# --- frequencies ----------------------------------------------------------


def llama_rotary(head_dim, theta, scaling, n_heads=2):
    transformers = pytest.importorskip("transformers")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    cfg = transformers.LlamaConfig(
        hidden_size=head_dim * n_heads, num_attention_heads=n_heads,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": theta,
                         **(scaling or {})},
    )
    return llama.LlamaRotaryEmbedding(cfg), llama.apply_rotary_pos_emb


@pytest.mark.parametrize("scaling", [
    None, {"rope_type": "linear", "factor": 4.0}, LLAMA3,
    LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 64},
])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("head_dim", [2, 8, 64, 128])
def test_equal_to_llamas_rotary_embedding(head_dim, theta, scaling):
    rotary, apply = llama_rotary(head_dim, theta, scaling)
    freqs = rope_frequencies(head_dim, theta, scaling)
    assert_close(freqs, rotary.inv_freq, rtol=1e-6, atol=0)
    q = randn(2, 4, 11, head_dim, dtype=torch.float32)
    k = randn(2, 2, 11, head_dim, seed=1, dtype=torch.float32)
    positions = torch.stack((torch.arange(11), torch.arange(100, 111)))
    theirs = apply(q, k, *rotary(q, positions))
    cos, sin = rope_tables(positions, freqs)
    ours = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
    assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_interleaved_equals_gptj():
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    x = randn(2, 5, 3, 8, dtype=torch.float32)  # (B, T, H, K), as GPT-J
    sin, cos = gptj.create_sinusoidal_positions(5, 8).chunk(2, dim=-1)
    theirs = gptj.apply_rotary_pos_emb(x, sin[None], cos[None])
    tables = rope_tables(torch.arange(5), rope_frequencies(8))
    ours = apply_rope(x.transpose(1, 2), *tables, layout="interleaved")
    assert_close(ours, theirs.transpose(1, 2))


def test_partial_equals_gpt_neox():
    name = "transformers.models.gpt_neox.modeling_gpt_neox"
    neox = pytest.importorskip(name)
    q = randn(2, 3, 5, 16, dtype=torch.float32)
    cos, sin = rope_tables(torch.arange(5), rope_frequencies(4))
    wide = [torch.cat((z, z), dim=-1)[None] for z in (cos, sin)]
    theirs, _ = neox.apply_rotary_pos_emb(q, q, *wide)
    ours = apply_rope(q, cos, sin)
    assert_close(ours, theirs)
    assert torch.equal(ours[..., 4:], q[..., 4:])


@given(dim=dims, theta=st.floats(10, 1e6), factor=st.floats(1, 100),
       length=st.integers(16, 10_000))
def test_llama3_keeps_the_fast_and_slows_the_slow(dim, theta, factor, length):
    scaling = LLAMA3 | {"factor": factor,
                        "original_max_position_embeddings": length}
    plain = rope_frequencies(dim, theta)
    scaled = rope_frequencies(dim, theta, scaling)
    turns = length * plain / (2 * math.pi)
    ratio = plain / scaled
    assert_close(ratio[turns > 4.001], torch.ones_like(plain)[turns > 4.001])
    slow = turns < 0.999
    assert_close(ratio[slow], torch.full_like(plain, factor)[slow],
                 rtol=1e-5, atol=0)
    assert (ratio > 0.9999).all() and (ratio < factor * 1.0001).all()
    assert (ratio.diff() > -1e-4 * factor).all()  # never slower than slower


def test_scaling_reads_old_names_and_ignores_other_keys():
    plain = rope_frequencies(8)
    old = {"type": "linear", "factor": 2, "rope_theta": 1.0}
    assert_close(scale_frequencies(plain, old), plain / 2)
    assert torch.equal(scale_frequencies(plain, {"rope_type": "default"}),
                       plain)


# --- the rotation ---------------------------------------------------------


@given(dim=dims, layout=layouts, seed=seeds, T=st.integers(0, 6),
       batched=st.booleans())
def test_equal_to_the_definition(dim, layout, seed, T, batched):
    positions = torch.randint(0, 500, (2, T) if batched else (T,),
                              generator=torch.Generator().manual_seed(seed))
    cos, sin = exact_tables(positions, dim)
    if batched:
        cos, sin = cos[:, None], sin[:, None]
    x = randn(2, 3, T, dim, seed=seed)
    out = apply_rope(x, cos, sin, layout)
    assert_close(out, turned_plainly(x, cos, sin, layout), **TIGHT)
    assert_close(out.norm(dim=-1), x.norm(dim=-1), **TIGHT)
    assert_close(apply_rope(out, cos, -sin, layout), x, **TIGHT)


@given(dim=dims, layout=layouts, seed=seeds, shift=st.integers(0, 5000))
def test_scores_depend_on_distance_alone(dim, layout, seed, shift):
    q, k = randn(2, 1, 1, 7, dim, seed=seed).unbind(0)
    at = torch.arange(7)

    def scores(positions):
        tables = exact_tables(positions, dim)
        return (apply_rope(q, *tables, layout)
                @ apply_rope(k, *tables, layout).transpose(-2, -1))

    assert_close(scores(at), scores(at + shift), rtol=0, atol=1e-9)
    assert_close(scores(at).diagonal(dim1=-2, dim2=-1), (q * k).sum(-1))


def test_interleaved_is_complex_multiplication():
    x = randn(2, 3, 5, 8)
    cos, sin = exact_tables(torch.arange(5), 8)
    as_complex = torch.view_as_complex(x.unflatten(-1, (4, 2)).contiguous())
    theirs = torch.view_as_real(as_complex * torch.complex(cos, sin))
    assert_close(apply_rope(x, cos, sin, "interleaved"), theirs.flatten(-2),
                 **TIGHT)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients(layout):
    x = randn(2, 2, 3, 6).requires_grad_()
    tables = exact_tables(torch.tensor([0, 3, 900]), 6)
    fn = lambda x: apply_rope(x, *tables, layout)
    assert torch.autograd.gradcheck(fn, x)
    assert torch.autograd.gradgradcheck(fn, x)
    # tables that are learned themselves get their gradients too
    cos, sin = (t.clone().requires_grad_() for t in tables)
    assert torch.autograd.gradcheck(
        lambda *z: apply_rope(*z, layout), (x, cos, sin))
    assert torch.autograd.gradcheck(  # one of the two alone as well
        lambda x, sin: apply_rope(x, cos.detach(), sin, layout), (x, sin))
    # and the partial rotation lets the rest pass
    wide = randn(1, 1, 3, 10).requires_grad_()
    assert torch.autograd.gradcheck(fn, wide)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_under_vmap_and_compile(layout):
    tables = exact_tables(torch.arange(4), 6)
    fn = lambda x: apply_rope(x, *tables, layout)
    x = randn(5, 2, 4, 6)
    assert_close(torch.func.vmap(fn)(x), fn(x), **TIGHT)
    per_row = torch.func.vmap(torch.func.grad(lambda x: fn(x).pow(3).sum()))
    leaf = x.clone().requires_grad_()
    fn(leaf).pow(3).sum().backward()
    assert_close(per_row(x), leaf.grad, **TIGHT)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    other = x.clone().requires_grad_()
    compiled(other).pow(3).sum().backward()
    assert_close(other.grad, leaf.grad, **TIGHT)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_kernels_each_way_and_no_copy(layout):
    # as the model makes it: heads cut from a (B, T, D) projection
    whole = randn(2, 9, 24).requires_grad_()
    x = whole.unflatten(-1, (3, 8)).transpose(1, 2)
    tables = exact_tables(torch.arange(9), 8)
    with Kernels() as forward:
        out = apply_rope(x, *tables, layout)
    assert forward.seen == {"mul": 1, "addcmul_": 2}
    grad = randn(*out.shape, seed=1)
    with Kernels() as backward:
        torch.autograd.grad(out, x, grad)
    assert backward.seen == {"mul": 1, "addcmul_": 2, "neg": 1}
    with torch.no_grad(), Kernels() as free:
        apply_rope(x, *tables, layout)
    assert free.seen == forward.seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16,
                                   torch.float32, torch.float64])
def test_the_result_has_the_dtype_of_x(dtype):
    cos, sin = rope_tables(torch.arange(5), rope_frequencies(8))
    x = randn(1, 2, 5, 8).to(dtype)
    out = apply_rope(x, cos, sin)
    assert out.dtype == dtype
    exact = turned_plainly(x.double(), cos.double(), sin.double(), "half")
    tolerance = 4 * torch.finfo(dtype).eps
    assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)


def test_angles_stay_precise_in_a_bfloat16_model():
    far = torch.arange(100_000, 100_064)
    exact = exact_tables(far, 64)
    cos, sin = rope_tables(far, rope_frequencies(64), torch.bfloat16)
    assert cos.dtype == sin.dtype == torch.bfloat16
    for ours, best in zip((cos, sin), exact):
        assert (ours.double() - best).abs().max() < 0.01  # 2^-8 and float32


def test_tables_of_a_batch_are_those_of_its_rows():
    positions = torch.tensor([[0, 1, 2], [7, 8, 9]])
    freqs = rope_frequencies(6)
    both = rope_tables(positions, freqs)
    assert both[0].shape == (2, 1, 3, 3)
    for b in range(2):
        one = rope_tables(positions[b], freqs)
        assert one[0].shape == (3, 3)
        for z, w in zip(both, one):
            assert torch.equal(z[b, 0], w)


# --- the two layouts ------------------------------------------------------


@given(heads=st.integers(1, 4), groups=st.integers(1, 3),
       half=st.integers(1, 4), extra=st.integers(0, 3), seed=seeds,
       to=layouts)
def test_converted_projections_leave_the_scores(heads, groups, half, extra,
                                                seed, to):
    H, n_kv, R = heads * groups, heads, 2 * half
    K, D, T = R + extra, 5, 6
    other = LAYOUTS[1 - LAYOUTS.index(to)]
    x = randn(1, T, D, seed=seed)
    tables = exact_tables(torch.arange(T), R)

    def scores(q_weight, k_weight, bias, layout):
        q = (x @ q_weight.T + bias).unflatten(-1, (H, K)).transpose(1, 2)
        k = (x @ k_weight.T).unflatten(-1, (n_kv, K)).transpose(1, 2)
        q = apply_rope(q, *tables, layout)
        k = apply_rope(k, *tables, layout).repeat_interleave(groups, dim=1)
        return q @ k.transpose(-2, -1)

    q_weight, k_weight = randn(H * K, D, seed=1), randn(n_kv * K, D, seed=2)
    bias = randn(H * K, seed=3)
    before = scores(q_weight, k_weight, bias, other)
    after = scores(convert_rope(q_weight, H, to, R),
                   convert_rope(k_weight, n_kv, to, R),
                   convert_rope(bias, H, to, R), to)
    assert_close(before, after, **TIGHT)
    back = convert_rope(convert_rope(q_weight, H, to, R), H, other, R)
    assert torch.equal(back, q_weight)


def test_equal_to_the_permutation_of_llamas_converter():
    H, K, D = 4, 8, 5
    w = randn(H * K, D)
    theirs = w.view(H, K // 2, 2, D).transpose(1, 2).reshape(H * K, D)
    assert torch.equal(convert_rope(w, H, "half"), theirs)


def test_mixed_layouts_change_the_scores_without_an_error():
    q, k = randn(2, 1, 1, 12, 8).unbind(0)
    tables = exact_tables(torch.arange(12), 8)
    half, mixed = (apply_rope(q, *tables, layout)
                   @ apply_rope(k, *tables, layout).transpose(-2, -1)
                   for layout in LAYOUTS)
    same = torch.eye(12, dtype=torch.bool)
    assert_close(half[0, 0][same], mixed[0, 0][same])  # distance 0 hides it
    assert (half - mixed)[0, 0][~same].abs().mean() > 0.5


# --- bad input ------------------------------------------------------------


@pytest.mark.parametrize(("call", "parts"), [
    (lambda: sinusoidal_embedding(torch.arange(3), 7), ("7", "even")),
    (lambda: alibi_slopes(0), ("n_heads=0", "at least 1")),
    (lambda: rope_frequencies(5), ("head_dim=5", "even")),
    (lambda: rope_frequencies(0), ("head_dim=0", "even")),
    (lambda: rope_frequencies(4, 0.0), ("theta=0.0", "10000")),
    (lambda: rope_frequencies(4, scaling={"rope_type": "yarn"}),
     ("yarn", "llama3")),
    (lambda: rope_frequencies(4, scaling={}), ("{}", "linear")),
    (lambda: rope_frequencies(4, scaling={"rope_type": "linear"}),
     ("linear", "['factor']")),
    (lambda: rope_frequencies(4, scaling={"rope_type": "llama3",
                                          "factor": 2.0}),
     ("lacks", "low_freq_factor")),
    (lambda: rope_frequencies(4, scaling={"rope_type": "linear",
                                          "factor": 0.25}),
     ("0.25", "factor >= 1")),
    (lambda: rope_frequencies(4, scaling=LLAMA3 | {"high_freq_factor": 1.0}),
     ("high_freq_factor", "low_freq_factor")),
    (lambda: apply_rope(torch.zeros(1, 1, 2, 4), torch.ones(2, 2),
                        torch.zeros(2, 2), "llama"), ("llama", "half")),
    (lambda: apply_rope(torch.zeros(1, 1, 2, 4), torch.ones(2, 3),
                        torch.zeros(2, 3)), ("6 coordinates", "K=4")),
    (lambda: apply_rope(torch.zeros(1, 1, 2, 4), torch.ones(1, 2),
                        torch.zeros(1, 2)), ("1 positions", "T=2")),
    *[(lambda n=n, more=more: apply_rope(
        torch.zeros(n, 1, 2, 4), torch.ones(*more, 2, 2),
        torch.zeros(*more, 2, 2)), (str((*more, 2, 2)), f"({n}, 1, 2, 4)"))
      for n, more in ((1, (3, 1)), (2, (3, 1)), (1, (1, 2)), (1, (1, 1, 1)))],
    (lambda: apply_rope(torch.zeros(1, 1, 2, 4), torch.ones(2, 2),
                        torch.zeros(2, 1)), ("do not fit",)),
    (lambda: rope_frequencies(4, scaling="linear"), ("'linear'", "None")),
    *[(lambda f=f: rope_frequencies(4, scaling={
        "rope_type": "linear", "factor": f}), (repr(f), "numbers > 0"))
      for f in ("2", -2.0, 0, math.nan, math.inf, True, [2.0])],
    *[(lambda n=n, v=v: rope_frequencies(4, scaling=LLAMA3 | {n: v}),
       (repr(v), "numbers > 0"))
      for n in ("low_freq_factor", "high_freq_factor",
                "original_max_position_embeddings")
      for v in ("1", -1.0, math.nan)],
    (lambda: convert_rope(torch.zeros(8, 3), 2, "gptj"), ("gptj", "half")),
    (lambda: convert_rope(torch.zeros(8, 3), 3, "half"),
     ("8 rows", "n_heads=3")),
    (lambda: convert_rope(torch.zeros(8, 3), 0, "half"),
     ("8 rows", "n_heads=0")),
    (lambda: convert_rope(torch.zeros(6, 3), 2, "half"),
     ("3 coordinates", "head_dim=3", "even rotary_dim")),
    (lambda: convert_rope(torch.zeros(8, 3), 2, "half", 6), ("6 coord",)),
])
def test_bad_input_names_value_and_remedy(call, parts):
    with pytest.raises(ValueError) as error:
        call()
    for part in parts:
        assert part in str(error.value)
