"""Predictions against counts, bounds by hand, two processes against one."""

import math
import subprocess
from dataclasses import replace

import pytest
import torch
from tensors import TINY

from minillm import scaling
from minillm.accounting import flops_per_token
from minillm.pretrain import cross_entropy
from minillm.scaling import (
    Ceiling,
    PartTimer,
    StepBenchmark,
    accelerators,
    average_gradients,
    benchmark_step,
    chinchilla_tokens,
    measure_ceiling,
    part_bounds,
    pipeline_bubble,
    ring_all_reduce,
    run_data_parallel,
    simulate_pipeline,
    step_costs,
    step_limits,
    time_calls,
    training_cost,
)
from minillm.transformer import GPT, count_parameters

CONFIGS = [
    TINY,
    replace(TINY, n_kv_heads=1, activation="swiglu", norm="rms", bias=False),
    replace(TINY, positions="rope", qk_norm=True, sliding_window=8),
    replace(TINY, positions="alibi", norm_position="post"),
]
CEILING = Ceiling(
    "cpu", "a machine", 1, {"float32": 100e9, "bfloat16": 400e9}, 20e9
)


@pytest.fixture(autouse=True)
def one_thread():
    """Keep timings and rounding independent of what ran before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def batch(cfg, B=3, T=24):
    tokens = torch.randint(cfg.vocab_size, (B, T + 1))
    return tokens[:, :-1], tokens[:, 1:].contiguous()


def test_time_calls_times_only_after_warm_up():
    calls = []
    seconds = time_calls(lambda: calls.append(1), repeats=3, warmup=2)
    assert len(seconds) == 3 and len(calls) == 5 and min(seconds) >= 0
    with pytest.raises(ValueError, match="repeats=0"):
        time_calls(lambda: None, repeats=0)


def test_measured_ceiling_is_sane():
    ceiling = measure_ceiling("cpu", size=128, megabytes=4, repeats=3)
    assert ceiling.flops["float32"] > 1e8
    assert ceiling.bandwidth > 1e8
    ratio = ceiling.flops["float32"] / ceiling.bandwidth
    assert ceiling.ridge("float32") == ratio
    assert max(map(len, str(ceiling).splitlines())) <= 79


def test_bounds_take_the_slower_of_compute_and_memory():
    costs = {"product": (200e9, 1e9), "copy": (0.0, 40e9), "more": (0.0, 2e9)}
    bounds = part_bounds(costs, CEILING, "float32")
    assert bounds["product"] == ("compute", 2.0)
    assert bounds["copy"] == ("memory", 2.0)
    limits = step_limits(bounds)
    assert limits == {"compute": 2.0, "memory": pytest.approx(2.1)}
    faster = part_bounds(costs, CEILING, "bfloat16")
    assert faster["product"] == ("compute", 0.5)


@pytest.mark.parametrize("cfg", CONFIGS)
def test_costs_hold_all_flops_of_the_model(cfg):
    costs = step_costs(cfg, 4, 20)
    products = sum(f for part, (f, _) in costs.items() if part != "optimizer")
    assert products == flops_per_token(cfg, 20) * 4 * 20
    assert costs["optimizer"][1] == 40 * count_parameters(cfg)


def test_costs_shrink_with_shared_keys_and_halve_in_bfloat16():
    costs = step_costs(TINY, 4, 20)
    shared = step_costs(replace(TINY, n_kv_heads=1), 4, 20)
    assert shared["attention"][1] < costs["attention"][1]
    low = step_costs(TINY, 4, 20, dtype="bfloat16")
    assert low["feed-forward"][1] == costs["feed-forward"][1] / 2


@pytest.mark.parametrize("cfg", CONFIGS)
def test_every_kind_of_model_can_be_benchmarked(cfg):
    bench = benchmark_step(
        cfg, batch_size=2, dtype="float32", device="cpu", ceiling=CEILING,
        repeats=1,
    )  # fmt: skip
    assert min(bench.parts[k] for k in ("attention", "norms")) > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_benchmark_accounts_for_the_whole_step(dtype):
    bench = benchmark_step(
        TINY, batch_size=4, dtype=dtype, device="cpu", ceiling=CEILING,
        repeats=5,
    )  # fmt: skip
    assert list(bench.phases) == ["forward", "backward", "optimizer"]
    assert min(bench.phases.values()) > 0
    assert set(bench.parts) == set(bench.costs)
    assert min(bench.parts.values()) >= 0
    assert sum(bench.parts.values()) == pytest.approx(
        bench.step_seconds, rel=0.1
    )
    assert bench.flops == flops_per_token(TINY) * 4 * 24
    assert bench.mfu == pytest.approx(
        bench.flops / bench.step_seconds / CEILING.flops[dtype]
    )
    assert bench.tokens_per_second == pytest.approx(96 / bench.step_seconds)
    assert bench.bottleneck in ("compute", "memory", "overhead")
    assert f"{bench.bottleneck} bound" in str(bench)
    assert max(map(len, str(bench).splitlines())) <= 79


def fake_benchmark(**limits):
    costs = {"attention": (50e9, 1e9), "optimizer": (0.0, 2e9)}
    phases = {"forward": 0.3, "backward": 0.6, "optimizer": 0.1}
    parts = {"attention": 0.9, "optimizer": 0.1}
    return StepBenchmark(
        10, 1, 2, "float32", CEILING, phases, parts, costs, limits, 50 * 10**9
    )


@pytest.mark.parametrize("name", ["compute", "memory", "overhead"])
def test_the_largest_limit_is_the_bottleneck(name):
    limits = {"compute": 0.2, "memory": 0.2, "overhead": 0.2} | {name: 0.5}
    bench = fake_benchmark(**limits)
    assert bench.bottleneck == name
    assert "50% of this step" in bench.reason
    assert "attention, 40%" in bench.reason  # 0.9 s against a bound of 0.5 s
    assert bench.mfu == pytest.approx(0.5)


def test_benchmark_refuses_a_dtype_without_a_ceiling():
    bare = replace(CEILING, flops={"float32": 100e9})
    with pytest.raises(ValueError, match="bfloat16.*float32"):
        benchmark_step(TINY, dtype="bfloat16", device="cpu", ceiling=bare)


def test_part_timer_leaves_the_model_as_it_was():
    model = GPT(TINY, seed=0)
    x, y = batch(TINY)
    before = torch.autograd.grad(
        cross_entropy(model(x), y), list(model.parameters())
    )
    timer = PartTimer(model)
    during = torch.autograd.grad(
        cross_entropy(model(x), y), list(model.parameters())
    )
    timer.remove()
    assert set(timer.seconds) == {
        "attention", "feed-forward", "norms", "output head"
    }  # fmt: skip
    seen = dict(timer.seconds)
    cross_entropy(model(x), y)
    assert timer.seconds == seen and min(seen.values()) > 0
    torch.testing.assert_close(before, during, rtol=0, atol=0)


def test_chinchilla_and_costs_by_hand():
    assert chinchilla_tokens(124_439_808) == 2_488_796_160
    assert chinchilla_tokens(10, 0.5) == 5
    cost = training_cost(
        3.6e18, 1e14, mfu=0.5, n_devices=4, price_per_hour=3.0
    )
    assert cost.device_hours == pytest.approx(20.0)
    assert cost.hours == pytest.approx(5.0)
    assert cost.price == pytest.approx(60.0)
    assert training_cost(1e18, 1e14).price is None


def test_bad_costs_are_refused():
    with pytest.raises(ValueError, match="n_params=0"):
        chinchilla_tokens(0)
    for mfu in (0, 40):
        with pytest.raises(ValueError, match=f"mfu={mfu}.*0.4 for 40%"):
            training_cost(1e18, 1e14, mfu=mfu)
    with pytest.raises(ValueError, match="n_devices=0"):
        training_cost(1e18, 1e14, n_devices=0)


def test_every_accelerator_names_its_source():
    gpus = accelerators()
    assert len({g.name for g in gpus}) == len(gpus) >= 4
    for gpu in gpus:
        assert gpu.source.startswith("https://")
        assert 50 < gpu.flops / gpu.bandwidth < 1000


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [1, 7, 60])
def test_ring_gives_everyone_the_sum(n, length):
    vectors = list(torch.randn(n, length, dtype=torch.float64))
    copies = [v.clone() for v in vectors]
    sums, sent = ring_all_reduce(vectors)
    for total in sums:
        torch.testing.assert_close(total, sum(copies))
    torch.testing.assert_close(vectors, copies)  # inputs untouched
    assert sent <= 2 * (n - 1) * math.ceil(length / n)


def test_ring_refuses_vectors_that_do_not_match():
    with pytest.raises(ValueError, match="same length"):
        ring_all_reduce([torch.ones(3), torch.ones(4)])


@pytest.mark.parametrize("S", [1, 2, 5])
@pytest.mark.parametrize("M", [1, 3, 8])
@pytest.mark.parametrize("backward", [1.0, 2.0])
def test_pipeline_simulation_obeys_its_rules(S, M, backward):
    schedule = simulate_pipeline(S, M, backward=backward)
    assert len(schedule) == 2 * S * M
    ends = {(k, m, s): end for s, m, k, _, end in schedule}
    for stage, micro, kind, start, _ in schedule:
        step = -1 if kind == "forward" else 1
        assert start >= ends.get((kind, micro, stage + step), 0.0)
        if kind == "backward":
            assert start >= ends["forward", micro, stage]
    for stage in range(S):
        spans = sorted((a, b) for s, *_, a, b in schedule if s == stage)
        assert all(b <= c for (_, b), (c, _) in zip(spans, spans[1:]))
    idle = 1 - M * (1 + backward) / max(ends.values())
    assert idle == pytest.approx(pipeline_bubble(S, M))


def test_pipeline_needs_a_stage_and_a_micro_batch():
    with pytest.raises(ValueError, match="n_micro=0"):
        pipeline_bubble(2, 0)


def parallel_data(steps=4, B=4):
    tokens = torch.randint(TINY.vocab_size, (steps, B, 17))
    return tokens[..., :-1], tokens[..., 1:]


@pytest.mark.parametrize(
    ("optimizer", "dtype", "world_size"),
    [("sgd", "float32", 2), ("adamw", "float64", 2), ("sgd", "float32", 4)],
)
def test_several_processes_equal_one(optimizer, dtype, world_size):
    x, y = parallel_data()
    options = {"optimizer": optimizer, "dtype": dtype, "lr": 0.01}
    one = run_data_parallel(TINY, x, y, world_size=1, **options)
    many = run_data_parallel(
        TINY, x, y, world_size=world_size, timeout=120, **options
    )
    assert many.spread == 0.0
    start = dict(GPT(TINY, seed=0).named_parameters())
    for name, weight in one.weights.items():
        torch.testing.assert_close(
            many.weights[name], weight, rtol=0, atol=1e-6
        )
        assert not torch.equal(weight.float(), start[name]), name
    assert many.losses == pytest.approx(one.losses, abs=1e-5)


def test_unequal_shares_and_dropout_are_refused():
    x, y = parallel_data(B=5)
    with pytest.raises(ValueError, match="batch of 5 over 2"):
        run_data_parallel(TINY, x, y)
    with pytest.raises(ValueError, match="dropout=0.1"):
        run_data_parallel(replace(TINY, dropout=0.1), x[:, :4], y[:, :4])


class Spy(subprocess.Popen):
    """Remember every process that was started."""

    started: list = []

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.started.append(self)


@pytest.fixture
def processes(monkeypatch):
    Spy.started = []
    monkeypatch.setattr(scaling.subprocess, "Popen", Spy)
    return Spy


def test_a_failing_worker_stops_all_and_tells_why(processes):
    x, y = parallel_data()
    x[2, 3, 0] = TINY.vocab_size  # in the second process's share, third step
    with pytest.raises(RuntimeError, match="process 1 of 2 .*token id 50"):
        run_data_parallel(TINY, x, y, timeout=120)
    assert len(processes.started) == 2
    assert all(p.returncode is not None for p in processes.started)


def test_nothing_hangs_when_time_is_up(processes):
    x, y = parallel_data()
    with pytest.raises(RuntimeError, match="not done after 0.05 s"):
        run_data_parallel(TINY, x, y, timeout=0.05)
    assert all(p.returncode is not None for p in processes.started)


def test_a_missing_gradient_is_named():
    model = GPT(TINY, seed=0)
    with pytest.raises(ValueError, match="tok_emb.weight has no gradient"):
        average_gradients(model)
