"""The clinic's runs are deterministic, and the doctor keeps its head."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.doctor import (
    FARM_WORDS,
    FAULTS,
    HEALTHY,
    REMEDIES,
    Case,
    ClinicRun,
    Finding,
    accumulation_error,
    clinic_run,
    diagnose,
    farm_levels,
    farm_text,
    format_findings,
    future_effect,
    read_run,
    sick_model,
    take_vitals,
    target_shift,
    text_overlap,
)
from minillm.files import cache_dir
from minillm.pretrain import IGNORE_INDEX, cross_entropy, evaluate_loss

RUNS = {}


def run_of(name, seed=0):
    """Train each case once for all tests; hand out copies of the numbers."""
    if (name, seed) not in RUNS:
        RUNS[name, seed] = clinic_run(name, seed)
    return RUNS[name, seed]


def names(findings):
    return [f.fault for f in findings]


def changed(run, change):
    """Return run.json and records after `change(head, records)`."""
    head, records = copy.deepcopy((run.run, run.history))
    change(head, records)
    return head, records


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------- the farm


def test_the_farm_has_the_levels_it_claims():
    floor, unigram, size = farm_levels()
    tokens = farm_text(40_000, seed=3)
    counts = np.bincount(tokens, minlength=len(FARM_WORDS))
    p = counts / counts.sum()
    assert abs(-(p * np.log(p)).sum() - unigram) < 0.01
    sizes = np.array([len(w) + 1 for w in FARM_WORDS])
    assert abs(sizes[tokens].mean() - size) < 0.02
    rows = tokens.reshape(-1, 10)
    free = 0.0  # the entropy of each column of its own; two are fixed
    for column in rows[:, :7].T:
        q = np.bincount(column) / len(column)
        q = q[q > 0]
        free -= (q * np.log(q)).sum()
    assert abs(free / 10 - floor) < 0.002
    assert len({(a, s) for a, s in rows[:, [2, 8]].tolist()}) == 8


def test_the_farm_in_order_is_the_same_text_sorted():
    plain, sorted_ = farm_text(500, 1), farm_text(500, 1, in_order=True)
    a = sorted(map(tuple, plain.reshape(-1, 10).tolist()))
    b = sorted(map(tuple, sorted_.reshape(-1, 10).tolist()))
    assert a == b and (np.diff(sorted_.reshape(-1, 10)[:, 2]) >= 0).all()
    assert not np.array_equal(farm_text(5, 1), farm_text(5, 2))


# ------------------------------------------------------------- the runs


def test_every_fault_has_a_remedy_and_no_name_is_used_twice():
    assert set(REMEDIES) == set(FAULTS)
    assert not set(FAULTS) & set(HEALTHY)
    assert len(FAULTS) >= 12 and len(HEALTHY) >= 3
    assert all(case == Case(**vars(case)) for case in FAULTS.values())


def test_runs_repeat_and_leave_the_global_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a = clinic_run("evaluation in train mode", 1)
    b = clinic_run("evaluation in train mode", 1)
    assert torch.equal(before, torch.get_rng_state())
    assert a.history == b.history and a.run == b.run
    assert a.history != run_of("evaluation in train mode", 0).history


def test_records_have_the_trainers_keys():
    run = run_of("plain")
    record = next(r for r in run.history if "update_ratio" in r)
    assert set(record) == {"step", "tokens", "loss", "grad_norm", "lr",
                           "clipped", "update_ratio"}
    stats = next(r for r in run.history if "stats" in r)["stats"]
    assert set(stats) == {"activations", "gradients", "weights", "updates"}
    assert set(stats["gradients"]) == set(stats["updates"])
    evals = [r for r in run.history if "val_loss" in r]
    assert [r["step"] for r in evals] == [0, 20, 40, 60, 80, 100, 100]
    assert evals[0]["val_loss"] > 3 * evals[-1]["val_loss"]
    assert run.history[-1]["sample"].startswith("the ")
    for name in ("diverging", "plain"):  # JSON without NaN
        json.dumps(run_of(name).history, allow_nan=False)
        json.dumps(run_of(name).run, allow_nan=False)


def test_the_runs_evaluation_is_the_books():
    run = run_of("plain")
    assert math.isclose(run.evaluate(), evaluate_loss(run.model,
                        run.val_tokens), rel_tol=1e-5)  # fmt: skip


def test_bad_names_are_refused():
    with pytest.raises(ValueError, match="choose one of plain"):
        clinic_run("hiccups")
    with pytest.raises(TypeError):
        clinic_run("plain", hiccups=True)


def test_the_zeroed_and_the_leaking_model():
    assert all((p == 0).all()
               for p in sick_model(FAULTS["init too small"]).parameters())
    x = torch.arange(20)[None]
    leaky = sick_model(FAULTS["leaky mask"])
    assert future_effect(leaky, x) > 1e-3
    with torch.no_grad():  # only the next one, with one block
        other = x.clone()
        other[0, -1] = 0
        moved = (leaky(x) - leaky(other)).abs().amax(-1)[0]
    assert moved[-2] > 0 and (moved[:-2] == 0).all()


# ----------------------------------------------------------- the doctor


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("name", FAULTS)
def test_the_doctor_names_each_fault(name, seed):
    findings = diagnose(run_of(name, seed))
    assert names(findings) == [name]
    f = findings[0]
    assert (f.cause, f.cure) == REMEDIES[name]
    assert any(c.isdigit() for c in f.evidence)


@pytest.mark.parametrize("seed", [0, 7, 8])
@pytest.mark.parametrize("name", HEALTHY)
def test_the_doctor_is_silent_on_healthy_runs(name, seed):
    assert diagnose(run_of(name, seed)) == []


@pytest.mark.parametrize("name", FAULTS)
def test_the_verdict_does_not_depend_on_the_name(name):
    run = run_of(name)
    other = ClinicRun("plain", run.run, run.history, run.model,
                      run.train_tokens, run.val_tokens, run.batch)
    assert diagnose(other) == diagnose(run)
    assert name not in json.dumps([run.run, run.history])


def test_directory_list_pair_and_run_say_the_same(tmp_path):
    for name in ("leaky mask", "diverging", "plain"):
        run = run_of(name)
        expected = diagnose(run)
        folder = run.save(tmp_path / name)
        assert diagnose(folder) == diagnose(str(folder)) == expected
        assert diagnose((run.run, run.history)) == expected
    assert names(diagnose(run_of("diverging").history)) == ["diverging"]


@pytest.mark.parametrize("key", ["val_loss", "train_eval_loss", "grad_norm",
                                 "lr", "clipped", "update_ratio", "stats",
                                 "loss", "tokens", "val_bits_per_byte"])
@pytest.mark.parametrize("name", HEALTHY)
def test_missing_keys_raise_no_false_alarm(name, key):
    def drop(head, records):
        for r in records:
            r.pop(key, None)
    assert diagnose(changed(run_of(name), drop)) == []


@pytest.mark.parametrize("key", ["floor", "unigram", "model", "training",
                                 "text"])
@pytest.mark.parametrize("name", HEALTHY)
def test_missing_fields_of_run_json_raise_no_false_alarm(name, key):
    run = run_of(name)
    for wrong in (None, "gone", *([3] if key != "floor" else [])):
        assert diagnose((run.run | {key: wrong}, run.history)) == []
    head = {k: v for k, v in run.run.items() if k != key}
    assert diagnose((head, run.history)) == []


def test_half_a_run_and_a_sparse_one_raise_no_false_alarm():
    for name in HEALTHY:
        run = run_of(name)
        for n in range(1, len(run.history)):
            assert diagnose((run.run, run.history[:n])) == []
        sparse = run.history[::4]
        assert diagnose((run.run, sparse)) == []
        assert diagnose(run.history) == []  # no run.json at all


def test_a_resumed_run_is_read_as_it_went_on(tmp_path):
    run = run_of("plain")
    first = [r for r in run.history if r["step"] <= 60]
    wild = [{"step": 65, "loss": None}, {"step": 70, "loss": None}]
    again = [r for r in run.history if r["step"] >= 60]
    _, records = read_run(first + wild + again)
    assert [r for r in records if r.get("loss", 0) is None] == []
    assert diagnose((run.run, first + wild + again)) == []


def test_a_damaged_file_is_read_as_far_as_it_goes(tmp_path):
    run = run_of("too little text")
    folder = run.save(tmp_path)
    path = folder / "metrics.jsonl"
    good = path.read_text("utf-8")
    path.write_text("[1]\nnull\n" + good + '{"step": 1, "lo', "utf-8")
    assert names(diagnose(folder)) == ["too little text"]
    (folder / "run.json").write_text("{", "utf-8")
    assert diagnose(folder) is not None
    bad = folder / "bad_batches"
    bad.mkdir()
    (bad / "step-00000012.safetensors").write_bytes(b"")
    path.write_text(good, "utf-8")
    assert "step-00000012" in diagnose(folder)[0].evidence


def test_nothing_to_read_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="metrics.jsonl"):
        diagnose(tmp_path)
    for nothing in ([], [{"loss": 1.0}], [3, None]):
        with pytest.raises(ValueError, match="train for a while"):
            diagnose(nothing)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no records"):
        diagnose(tmp_path)


values = st.one_of(st.none(), st.floats(), st.integers(-5, 10**6),
                   st.text(max_size=3), st.booleans())
records = st.fixed_dictionaries({"step": st.integers(0, 1000)}, optional={
    key: values for key in ("loss", "val_loss", "grad_norm", "lr", "clipped",
                            "tokens", "update_ratio", "train_eval_loss",
                            "val_bits_per_byte", "sample", "stats")})


@settings(max_examples=150)
@given(st.lists(records, min_size=1, max_size=30), st.booleans())
def test_no_history_breaks_the_doctor(history, with_head):
    run = run_of("plain")
    findings = diagnose((run.run if with_head else {}, history))
    assert all(isinstance(f, Finding) for f in findings)
    text = format_findings(findings)
    assert max(map(len, text.splitlines())) <= 79


def test_vitals_convert_the_floor_and_count_epochs():
    head, records = read_run(run_of("too little text"))
    v = take_vitals(head, records)
    assert math.isclose(v.floor, farm_levels()[0], rel_tol=1e-6)
    assert math.isclose(v.epochs, 100 * 16 * 24 / 150)
    assert v.start > 3 and v.end < 1


def test_the_shared_model_of_the_book_is_healthy():
    folders = [p for p in (cache_dir() / "tales-model").glob("*")
               if (p / "metrics.jsonl").is_file()]
    if not folders:
        pytest.skip("the shared TinyTales model has not been trained here")
    for folder in folders:
        assert diagnose(folder) == []


# --------------------------------------------------- what is tried out


def test_the_model_settles_what_numbers_leave_open():
    run = run_of("validation is training text")
    assert names(diagnose(run, train_tokens=run.train_tokens,
                 val_tokens=run.val_tokens)) == [run.name]  # fmt: skip
    leaky = run_of("leaky mask")
    assert names(diagnose(leaky, model=leaky.model)) == ["leaky mask"]
    head, records = changed(leaky, lambda h, r: h.update(text="100-x"))
    assert names(diagnose((head, records)))[0].startswith("validation")
    texts = dict(train_tokens=leaky.train_tokens, val_tokens=leaky.val_tokens)
    assert names(diagnose((head, records), **texts)) == ["leaky mask"]


def test_clipping_hides_a_missing_zero_grad_from_the_numbers_only():
    run = clinic_run("no zero_grad", 0, training={})
    assert "no zero_grad" not in names(diagnose(run))
    assert names(diagnose(run, model=run.model))[0] == "no zero_grad"


def test_healthy_things_pass_every_trial():
    run = run_of("plain")

    def right(model, parts):
        n = sum((y != IGNORE_INDEX).sum() for _, y in parts)
        for x, y in parts:
            (cross_entropy(model(x), y, reduction="sum") / n).backward()

    everything = dict(model=run.model, batch=run.batch, evaluate=run.evaluate,
                      train_tokens=run.train_tokens,
                      val_tokens=run.val_tokens, accumulate=right)
    assert diagnose(run, **everything) == []


@pytest.mark.parametrize("name", ["leaky mask", "softmax twice",
                                  "targets not shifted",
                                  "evaluation in train mode",
                                  "validation is training text"])
def test_trials_alone_find_the_fault(name):
    run, plain = run_of(name), run_of("plain")
    found = diagnose(plain, model=run.model, batch=run.batch,
                     evaluate=run.evaluate, train_tokens=run.train_tokens,
                     val_tokens=run.val_tokens)  # fmt: skip
    assert names(found) == [name]


@given(st.integers(0, 3), st.integers(2, 6), st.integers(6, 12))
def test_target_shift_finds_the_shift(shift, B, T):
    g = torch.Generator().manual_seed(100 * shift + 10 * B + T)
    row = torch.randint(100, (B, T + 4), generator=g)
    assert target_shift(row[:, :T], row[:, shift : shift + T]) == shift
    y = row[:, 1 : T + 1].clone()
    y[:, T // 2 :] = IGNORE_INDEX
    assert target_shift(row[:, :T], y) == 1
    assert target_shift(row[:, :T], y.flip(1).clamp(min=0) + 100) is None


def test_trials_refuse_what_they_cannot_use():
    with pytest.raises(ValueError, match="at least 2"):
        future_effect(sick_model(Case()), torch.zeros(1, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="must both be"):
        target_shift(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="two rows"):
        x = torch.zeros(1, 4, dtype=torch.long)
        accumulation_error(None, sick_model(Case()), (x, x))


def test_overlap_is_a_share_of_windows():
    text = np.random.default_rng(0).integers(0, 1000, 5000)
    assert text_overlap(text, text[100:300]) == 1.0
    assert text_overlap(text, text[::-1].copy()) == 0.0
    mixed = np.concatenate([text[:115], text[::-1][:100]])
    assert 0.4 < text_overlap(text, mixed) < 0.6
    assert text_overlap(text, text[:15]) == text_overlap(text[:3], text) == 0
    for dtype in (np.uint16, np.int32, np.int64):
        assert text_overlap(text.astype(dtype), text[9:60]) == 1.0


def test_accumulation_error_measures_the_missing_factor():
    model = sick_model(Case()).double()
    x = torch.arange(80).reshape(4, 20) % 37
    y = (x + 1) % 37

    def sums(model, parts):
        n = sum((y != IGNORE_INDEX).sum() for _, y in parts)
        for x, y in parts:
            (cross_entropy(model(x), y, reduction="sum") / n).backward()

    def means(model, parts, share=1.0):
        for x, y in parts:
            (share * cross_entropy(model(x), y)).backward()

    assert accumulation_error(sums, model, (x, y)) < 1e-5
    error = accumulation_error(lambda m, p: means(m, p, 0.5), model, (x, y))
    assert 0.01 < error < 1
    assert accumulation_error(means, model, (x, y)) > 0.5
    assert all(p.grad is None for p in model.parameters())


def test_the_text_for_the_terminal():
    text = format_findings(diagnose(run_of("dead rate")))
    assert text.startswith("1. dead rate\n   evidence ")
    assert "cause" in text and "cure" in text
    assert "No fault" in format_findings([])
    for run in RUNS.values():
        lines = format_findings(diagnose(run)).splitlines()
        assert max(map(len, lines)) <= 79


@pytest.mark.parametrize("n", [3, 12])
def test_a_loss_above_a_guess_is_never_a_low_rate(n):
    """A huge rate without statistics: a few records, or falling evenly."""
    loss = [677.0 - 5 * i for i in range(n)]
    records = [{"step": 0, "val_loss": 6.24}] + [
        {"step": 10 * (i + 1), "tokens": 1000 * i, "loss": x,
         "grad_norm": 3.0, "lr": 10.0}
        for i, x in enumerate(loss)]  # fmt: skip
    head = {"model": {"vocab_size": 512}, "training": {"max_steps": 10 * n}}
    assert names(diagnose((head, records)))[:1] == ["rate too high"]


def test_nan_at_once_did_not_rise_before():
    records = [{"step": 0, "val_loss": 6.24},
               {"step": 10, "loss": None, "grad_norm": None, "lr": 10.0}]
    head = {"model": {"vocab_size": 512}, "training": {"max_steps": 60}}
    finding = diagnose((head, records))[0]
    assert finding.fault == "diverging"
    assert "had risen" not in finding.evidence
