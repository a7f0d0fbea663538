"""Checkpoints: round trips, damage of every kind, crashes, pickles."""

import dataclasses
import errno
import gzip
import hashlib
import json
import math
import os
import pickle
import random
import shutil
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import minillm.checkpoint as module
from minillm.checkpoint import (
    Checkpoint,
    best_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_weights,
    mark_best,
    prune_checkpoints,
    read_hashed,
    read_sealed,
    read_tensors,
    refuse_pickle,
    save_checkpoint,
    verify_checkpoint,
    write_sealed,
    write_tensors,
)
from minillm.optim import make_optimizer
from minillm.pretrain import TrainConfig, cross_entropy
from minillm.transformer import GPT, GPTConfig

TINY = GPTConfig(vocab_size=13, context_length=8, d_model=8, n_layers=1,
                 n_heads=2, dropout=0.1)  # fmt: skip
FILES = ("checkpoint.json", "model.safetensors", "training.safetensors")


def fit(model, optimizer, n, seed=0):
    """Do n optimizer steps on random tokens."""
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(n):
        ids = torch.randint(13, (2, 9), generator=generator)
        cross_entropy(model(ids[:, :-1]), ids[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(seed=0, **changes):
    torch.manual_seed(seed)
    model = GPT(TINY, seed=seed)
    optimizer = make_optimizer(model, TrainConfig(**changes))
    fit(model, optimizer, 2)
    return model, optimizer


@pytest.fixture(scope="module")
def parts():
    return trained()


def same_weights(a, b):
    return all(torch.equal(p, q)
               for p, q in zip(a.parameters(), b.parameters()))  # fmt: skip


def names_in(folder):
    return sorted(p.name for p in folder.iterdir())


# --- round trips ---


class Odd(torch.optim.Optimizer):
    """An optimizer with state of many kinds."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["n"] = state.get("n", 0) + 1
                state["scale"] = state.get("scale", 1.0) * 0.7
                state["on"] = True
                state["nothing"] = None
                state["low"] = p.grad.bfloat16()
                state["cols"] = p.grad.t() if p.dim() == 2 else p.grad
                state["step"] = torch.tensor(float(state["n"]))
                with torch.no_grad():
                    p -= 0.1 * state["scale"] * state["low"].float()


MAKERS = {
    "make_optimizer": lambda m: make_optimizer(m, TrainConfig()),
    "muon": lambda m: make_optimizer(m, TrainConfig(optimizer="muon")),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), fused=False),
    "amsgrad": lambda m: torch.optim.AdamW(m.parameters(), amsgrad=True),
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "plain": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    "odd": lambda m: Odd(m.parameters()),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_every_optimizer_comes_back(tmp_path, kind):
    torch.manual_seed(0)
    model = GPT(TINY, seed=1)
    optimizer = MAKERS[kind](model)
    fit(model, optimizer, 3)
    rng = torch.get_rng_state()
    save_checkpoint(tmp_path / "c", model, optimizer, 7,
                    tensors={"rng/cpu": rng}, info={"seconds": 1.5})
    back = load_checkpoint(tmp_path / "c")
    assert back.step == 7 and back.cfg == TINY and back.info["seconds"] == 1.5
    other = back.build_model()
    assert same_weights(other, model) and not other.training
    again = MAKERS[kind](other)
    torch.rand(3)  # moves the generator
    back.load_optimizer(again, other)
    named = dict(other.named_parameters())
    for name, p in model.named_parameters():
        ours, theirs = optimizer.state[p], again.state[named[name]]
        for key, value in ours.items():
            if value is None:
                continue
            assert type(theirs[key]) is type(value)
            if isinstance(value, torch.Tensor):
                assert theirs[key].dtype == value.dtype
                assert torch.equal(theirs[key], value)
            else:
                assert theirs[key] == value
    torch.set_rng_state(back.tensors["rng/cpu"])
    fit(other, again, 3, seed=5)
    torch.set_rng_state(rng)
    fit(model, optimizer, 3, seed=5)
    assert same_weights(model, other)  # bit for bit, dropout included
    assert names_in(tmp_path) == ["c"]


def test_tied_weights_are_saved_once(tmp_path, parts):
    model, optimizer = parts
    save_checkpoint(tmp_path / "c", model, optimizer)
    back = load_checkpoint(tmp_path / "c")
    assert "lm_head.weight" not in back.weights
    rebuilt = back.build_model()
    assert rebuilt.lm_head.weight is rebuilt.tok_emb.weight
    n = sum(p.numel() for p in model.parameters())
    size = (tmp_path / "c/model.safetensors").stat().st_size
    assert 4 * n <= size < 4 * n + 4096


def test_an_older_state_of_the_optimizer_is_replaced(tmp_path, parts):
    model, _ = parts
    fresh = make_optimizer(model, TrainConfig())
    save_checkpoint(tmp_path / "c", model, fresh)  # no steps: no state
    used = make_optimizer(model, TrainConfig())
    for p in model.parameters():
        used.state[p]["exp_avg"] = torch.ones_like(p)
    load_checkpoint(tmp_path / "c").load_optimizer(used, model)
    assert not any(used.state.get(p) for p in model.parameters())


def test_foreign_optimizers_are_refused(tmp_path, parts):
    model, optimizer = parts
    with pytest.raises(ValueError, match="another model"):
        save_checkpoint(tmp_path / "c", GPT(TINY), optimizer)
    save_checkpoint(tmp_path / "c", model, optimizer)
    few = torch.optim.AdamW([model.tok_emb.weight])
    with pytest.raises(ValueError, match="does not hold it"):
        load_checkpoint(tmp_path / "c").load_optimizer(few, model)
    odd = Odd([model.tok_emb.weight])
    odd.state[model.tok_emb.weight]["history"] = [1, 2]
    with pytest.raises(ValueError, match="'history'.*list"):
        save_checkpoint(tmp_path / "d", model, odd)
    assert names_in(tmp_path) == ["c"]


def test_bad_arguments_leave_nothing(tmp_path, parts):
    model, _ = parts
    with pytest.raises(ValueError):
        save_checkpoint(tmp_path / "c", model, info={"loss": math.nan})
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path / "c", model, info={"model": model})
    with pytest.raises(ValueError, match="taken"):
        save_checkpoint(tmp_path / "c", model,
                        tensors={"optimizer/x": torch.ones(1)})
    with pytest.raises(ValueError, match="complex64"):
        save_checkpoint(tmp_path / "c", model,
                        tensors={"x": torch.ones(1, dtype=torch.complex64)})
    assert names_in(tmp_path) == []


def test_a_directory_that_is_no_checkpoint_is_not_replaced(tmp_path, parts):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("home", "file"):
        with pytest.raises(FileExistsError, match="not a checkpoint"):
            save_checkpoint(tmp_path / name, parts[0])
    assert names_in(tmp_path) == ["file", "home"]
    (tmp_path / "empty").mkdir()
    save_checkpoint(tmp_path / "empty", parts[0], step=1)
    assert load_checkpoint(tmp_path / "empty").step == 1


# --- the file format ---

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16,
          torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
          torch.bool]  # fmt: skip


@settings(max_examples=60, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(
    st.text(max_size=12).filter(lambda n: n != "__metadata__"
                                and "\0" not in n and n.isprintable()),
    st.tuples(st.sampled_from(DTYPES),
              st.lists(st.integers(0, 4), max_size=3), st.booleans()),
    max_size=6))
def test_our_files_are_safetensors_files(tmp_path, specs):
    tensors = {}
    for i, (name, (dtype, shape, turn)) in enumerate(specs.items()):
        t = torch.arange(100 * i, 100 * i + math.prod(shape)).to(dtype)
        tensors[name] = t.reshape(shape).t() if (
            turn and len(shape) == 2) else t.reshape(shape)
    size, digest = write_tensors(tmp_path / "ours", tensors)
    data = (tmp_path / "ours").read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (size, digest)
    save_file({n: t.contiguous() for n, t in tensors.items()},
              tmp_path / "theirs")
    both = (load_file(tmp_path / "ours"), read_hashed(tmp_path / "ours")[0],
            read_hashed(tmp_path / "theirs")[0])
    for found in both:
        assert found.keys() == tensors.keys()
        for name, t in tensors.items():
            assert found[name].dtype == t.dtype
            assert torch.equal(found[name], t)
    assert read_hashed(tmp_path / "ours")[1] == digest


@settings(max_examples=150, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.booleans())
def test_foreign_bytes_raise_value_error(tmp_path, data, framed):
    if framed:
        data = len(data).to_bytes(8, "little") + data
    (tmp_path / "w.safetensors").write_bytes(data)
    for read in (read_tensors, read_hashed):
        try:
            assert read(tmp_path / "w.safetensors") in ({}, ({}, None))
        except ValueError as error:
            assert "\n" not in str(error)
        except AssertionError:  # a valid file without tensors
            assert read is read_hashed


@pytest.mark.parametrize("header", [
    [], 3, {"a": 1}, {"a": {}},
    {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
    {"a": {"dtype": "U8", "shape": [10**12], "data_offsets": [0, 10**12]}},
    {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
    {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, -4]}},
    {"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}},
    {"a": {"dtype": "Q3", "shape": [1], "data_offsets": [0, 4]}},
    {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}},
])  # fmt: skip
def test_wrong_headers_are_refused(tmp_path, header):
    text = json.dumps(header).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 8)
    for read in (read_tensors, read_hashed):
        with pytest.raises(ValueError, match="damaged"):
            read(path)


def test_a_file_whose_length_begins_like_a_pickle_is_read(tmp_path):
    path, first = tmp_path / "w.safetensors", set()
    for n in range(0, 2048, 8):  # the length is a multiple of 8
        save_file({"w": torch.arange(3.0)}, path, {"note": "x" * n})
        first.add(path.read_bytes()[0])
        assert torch.equal(read_tensors(path)["w"], torch.arange(3.0))
    assert 0x80 in first


@pytest.mark.parametrize("content", [b"", b"x", b"hello world " * 10,
                                     b"\xff" * 64, b"\x08" + b"\0" * 7 + b"{"])
def test_foreign_files_give_one_line(tmp_path, content):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="not a safetensors") as caught:
        read_tensors(tmp_path / "w.safetensors")
    assert "\n" not in str(caught.value)


def test_writing_holds_one_tensor_twice_and_verifying_none(tmp_path, parts):
    code = (
        "import resource, sys, torch\n"
        "from minillm.checkpoint import write_tensors\n"
        "ts = {str(i): torch.ones(1000, 4000).t() for i in range(6)}\n"
        "write_tensors(sys.argv[1], {'0': torch.ones(10)})\n"
        "a = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "write_tensors(sys.argv[1], ts)\n"  # 16 MB each, not contiguous
        "b = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print((b - a) / 1024)\n"
    )
    out = subprocess.run([sys.executable, "-c", code, tmp_path / "w"],
                         capture_output=True, text=True, check=True).stdout
    assert float(out) < 45  # MB; all six would be 92
    save_checkpoint(tmp_path / "c", parts[0],
                    tensors={"big": torch.ones(5_000_000)})
    tracemalloc.start()
    verify_checkpoint(tmp_path / "c")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6


def test_what_was_verified_does_not_follow_the_file(tmp_path, parts):
    save_checkpoint(tmp_path / "c", parts[0], tensors={"x": torch.zeros(999)})
    back = load_checkpoint(tmp_path / "c")
    with open(tmp_path / "c/training.safetensors", "r+b") as f:
        f.seek(-4, 2)
        f.write(b"\0\0\x80\x3f")
    assert back.tensors["x"].sum() == 0
    with pytest.raises(ValueError, match="SHA-256"):
        load_checkpoint(tmp_path / "c")


# --- damage ---


@pytest.fixture(scope="module")
def saved(parts, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "c"
    return save_checkpoint(path, *parts, 7, tensors={"x": torch.arange(5)},
                           info={"loss": 1.25, "word": "\u00e9"})


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(FILES), st.floats(0, 1, exclude_max=True),
       st.integers(1, 255))
def test_any_flip_of_any_byte_is_detected(saved, file, place, mask):
    path = saved / file
    data = bytearray(path.read_bytes())
    good = bytes(data)
    data[int(place * len(data))] ^= mask
    path.write_bytes(data)
    try:
        for read in (load_checkpoint, verify_checkpoint):
            with pytest.raises(ValueError):
                read(saved)
    finally:
        path.write_bytes(good)
    assert load_checkpoint(saved).step == 7


def test_every_byte_of_the_head_is_guarded(saved):
    path = saved / "checkpoint.json"
    good, rng = path.read_bytes(), random.Random(0)
    try:
        for i in range(len(good)):
            data = bytearray(good)
            data[i] ^= rng.choice([1, 2, 4, 8, 16, 32, 64, 128, 3])
            path.write_bytes(data)
            with pytest.raises(ValueError):
                verify_checkpoint(saved)
    finally:
        path.write_bytes(good)
    assert verify_checkpoint(saved)["step"] == 7


@pytest.mark.parametrize("file", FILES)
def test_every_truncation_is_detected(saved, file):
    path = saved / file
    good = path.read_bytes()
    lengths = {0, 1, 7, 8, 9, len(good) - 1, len(good) + 1,
               *range(0, len(good), max(1, len(good) // 60))}  # fmt: skip
    try:
        for n in lengths:
            path.write_bytes(good[:n] if n <= len(good) else good + b"\0")
            for read in (load_checkpoint, verify_checkpoint):
                with pytest.raises(ValueError) as caught:
                    read(saved)
                assert file in str(caught.value)
        path.unlink()
        for read in (load_checkpoint, verify_checkpoint):
            with pytest.raises((ValueError, FileNotFoundError), match=file):
                read(saved)
    finally:
        path.write_bytes(good)


def damage(path, kind):
    if kind == "flip":
        data = bytearray((path / "model.safetensors").read_bytes())
        data[-9] ^= 1
        (path / "model.safetensors").write_bytes(data)
    elif kind == "cut":
        os.truncate(path / "training.safetensors", 100)
    elif kind == "empty":
        os.truncate(path / "model.safetensors", 0)
    elif kind == "remove":
        (path / "model.safetensors").unlink()
    elif kind == "head":
        (path / "checkpoint.json").write_text("{}")
    elif kind == "no head":
        (path / "checkpoint.json").unlink()
    elif kind == "no files":
        for p in path.iterdir():
            p.unlink()
    elif kind == "pickle":
        torch.save({"w": Trap()}, path / "model.safetensors")
    elif kind == "swapped":
        (path / "model.safetensors").rename(path / "x")
        (path / "training.safetensors").rename(path / "model.safetensors")
        (path / "x").rename(path / "training.safetensors")


class Trap:
    def __reduce__(self):
        return (os.system, ("echo unpickled > trap.txt",))


DAMAGES = ("flip", "cut", "empty", "remove", "head", "no head", "no files",
           "pickle", "swapped")  # fmt: skip


def make_run(folder, parts, steps=(9, 10, 11)):
    for step in steps:
        save_checkpoint(folder / f"checkpoints/step-{step}", *parts, step)
    return folder


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_newest_falls_back(tmp_path, parts, kind):
    run = make_run(tmp_path / "r", parts)
    newest = run / "checkpoints/step-11"
    assert load_checkpoint(run).step == 11
    damage(newest, kind)
    with pytest.raises((ValueError, FileNotFoundError)):
        load_checkpoint(newest)
    with pytest.warns(UserWarning, match="skipped.*step-11.*step 10") as notes:
        assert load_checkpoint(run).step == 10
    assert len(notes) == 1
    damage(run / "checkpoints/step-10", "flip")
    with pytest.warns(UserWarning, match="skipped") as notes:
        assert load_checkpoint(run).step == 9
    assert len(notes) == 2
    damage(run / "checkpoints/step-9", "cut")
    with pytest.raises(ValueError, match="all 3 checkpoints.*step-9"):
        load_checkpoint(run)


def test_steps_are_sorted_as_numbers(tmp_path, parts):
    run = make_run(tmp_path / "r", parts, (9, 10, 100, 99))
    found = list_checkpoints(run / "checkpoints")
    assert [p.name for p in found] == ["step-100", "step-99", "step-10",
                                       "step-9"]
    (run / "checkpoints/step-xyz").mkdir()
    (run / "checkpoints/notes.txt").write_text("")
    assert list_checkpoints(run / "checkpoints") == found
    assert list_checkpoints(tmp_path / "nowhere") == []


def test_missing_and_foreign_directories(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="not a minillm"):
        load_checkpoint(tmp_path)
    for text in ('{"format": "x"}', "[]", "{", "\xff",
                 '{"format": "minillm-checkpoint", "version": "1"}',
                 '{"format": "minillm-checkpoint", "version": 1}'):
        (tmp_path / "checkpoint.json").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match="checkpoint.json"):
            load_checkpoint(tmp_path)


# --- versions ---


def rewrite_head(path, **changes):
    head = read_sealed(path / "checkpoint.json")
    head.pop("digest")
    write_sealed(path / "checkpoint.json", head | changes)


def test_a_newer_version_is_refused_with_the_remedy(tmp_path, parts):
    save_checkpoint(tmp_path / "c", *parts, 7)
    rewrite_head(tmp_path / "c", version=3)
    with pytest.raises(ValueError, match="version 3.*pip install"):
        load_checkpoint(tmp_path / "c")
    rewrite_head(tmp_path / "c", version=2, more="is ignored")
    assert load_checkpoint(tmp_path / "c").step == 7


def test_version_1_is_still_read(tmp_path, parts):
    save_checkpoint(tmp_path / "c", *parts, 7)
    head = json.loads((tmp_path / "c/checkpoint.json").read_text())
    old = {k: head[k] for k in ("format", "step", "model", "info", "sha256")}
    (tmp_path / "c/checkpoint.json").write_text(
        json.dumps(old | {"version": 1}))
    back = load_checkpoint(tmp_path / "c")
    assert back.step == 7 and same_weights(back.build_model(), parts[0])
    damage(tmp_path / "c", "flip")
    with pytest.raises(ValueError, match="SHA-256"):
        load_checkpoint(tmp_path / "c")


# --- crashes, full disks ---


class Crash(BaseException):
    """The process is gone: nothing after this is done."""


class Disk:
    """Stand in for `os`, `shutil` and `open`; fail at call number `at`."""

    def __init__(self, at=None, error=None, stay=True):
        self.at, self.error, self.stay = at, error, stay
        self.n, self.log, self.failed = 0, [], False

    def count(self, what, path):
        self.log.append((what, Path(path).name if path else path))
        self.n += 1
        if self.n - 1 == self.at or (self.failed and self.stay):
            self.failed = True
            if self.error is None:
                raise Crash
            raise OSError(self.error, os.strerror(self.error))

    def __getattr__(self, name):  # of the modules os and shutil
        real = getattr(os if hasattr(os, name) else shutil, name)
        if name not in ("mkdir", "rename", "fsync", "rmtree", "rmdir"):
            return real

        def call(*args, **options):
            path = args[0]
            if name == "fsync":
                path = os.readlink(f"/proc/self/fd/{path}")
            try:
                self.count(name, path)
            except OSError:
                if options.get("ignore_errors"):
                    return None
                raise
            return real(*args, **options)
        return call

    def opened(self, path, mode="r", **options):
        f = open(path, mode, **options)
        if "w" not in mode:
            return f
        return Written(self, f, path)

    def use(self, monkeypatch):
        for name in ("os", "shutil"):
            monkeypatch.setattr(module, name, self)
        monkeypatch.setattr(module, "open", self.opened, raising=False)
        return self


class Written:
    """A file whose writes count; a failing one writes half."""

    def __init__(self, disk, f, path):
        self.disk, self.f, self.path = disk, f, path

    def write(self, data):
        try:
            self.disk.count("write", self.path)
        except BaseException:
            self.f.write(bytes(data)[: len(data) // 2])
            raise
        return self.f.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.f.close()

    def __getattr__(self, name):
        return getattr(self.f, name)


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(),
                                reason="names of open files")


@needs_proc
@pytest.mark.parametrize("existing", [False, True])
def test_everything_is_flushed_before_it_gets_its_name(
        tmp_path, parts, monkeypatch, existing):
    if existing:
        save_checkpoint(tmp_path / "c", *parts, 1)
    disk = Disk().use(monkeypatch)
    save_checkpoint(tmp_path / "c", *parts, 2)
    log = disk.log
    install = log.index(("rename", ".c.new"))
    for name in (*FILES, ".c.new"):
        assert ("fsync", name) in log[:install]
    assert log.index(("fsync", ".c.new")) > max(
        i for i, call in enumerate(log) if call[0] == "write")
    assert ("fsync", tmp_path.name) in log[install:]
    if existing:  # what was there goes last of all
        assert log.index(("rename", "c")) == install - 1
        assert log.index(("rmtree", ".c.old")) > log.index(
            ("fsync", tmp_path.name))


def count_calls(path, parts, monkeypatch):
    with monkeypatch.context() as patch:
        disk = Disk().use(patch)
        save_checkpoint(path, *parts, 2)
    return disk.n


@needs_proc
@pytest.mark.parametrize("existing", [False, True])
def test_a_crash_at_any_call_loses_nothing(
        tmp_path, parts, monkeypatch, existing):
    n = count_calls(tmp_path / "count", parts, monkeypatch)
    found = []
    for at in range(n + 2):
        path = tmp_path / f"run-{at}" / "checkpoints" / "step-2"
        save_checkpoint(path.with_name("step-1"), *parts, 1)
        if existing:
            save_checkpoint(path, *parts, 1)
        with monkeypatch.context() as patch:
            Disk(at).use(patch)
            try:
                save_checkpoint(path, *parts, 2)
            except Crash:
                pass
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            found.append(load_checkpoint(path.parent.parent).step)
            if existing:
                assert load_checkpoint(path).step in (1, 2)
        assert not any("damaged" in str(note.message) for note in notes)
        save_checkpoint(path, *parts, 3)  # the next save tidies up
        assert load_checkpoint(path).step == 3
        assert names_in(path.parent) == ["step-1", "step-2"]
    assert found == sorted(found) and set(found) == {1, 2}


@needs_proc
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("stay", [False, True])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_an_error_at_any_call_changes_nothing(
        tmp_path, parts, monkeypatch, existing, stay, code):
    n = count_calls(tmp_path / "count", parts, monkeypatch)
    failed = 0
    for at in range(n):
        path = tmp_path / f"run-{at}" / "c"
        path.parent.mkdir()
        if existing:
            save_checkpoint(path, *parts, 1)
        with monkeypatch.context() as patch:
            Disk(at, code, stay and at > 0).use(patch)
            try:
                save_checkpoint(path, *parts, 2)
                continue  # the last calls only tidy up
            except OSError as error:
                assert error.errno == code
                text = str(error)
        failed += 1
        for word in (str(path), "bytes", "free", "save elsewhere"):
            assert word in text
        if not stay:  # with a disk that is gone, nothing can be removed
            assert names_in(path.parent) == (["c"] if existing else [])
        if existing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert load_checkpoint(path).step in ((1, 2) if stay else (1,))
        save_checkpoint(path, *parts, 3)
        assert load_checkpoint(path).step == 3
        assert names_in(path.parent) == ["c"]
    assert failed >= n - 3


def test_a_full_disk_after_any_number_of_bytes(tmp_path, parts):
    resource = pytest.importorskip("resource")
    save_checkpoint(tmp_path / "c", *parts, 1)

    def content():
        return {p: p.read_bytes() for p in (tmp_path / "c").iterdir()}

    before = content()
    sizes = [p.stat().st_size for p in (tmp_path / "c").iterdir()]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    failed = 0
    for n in sorted({0, 1, 8, 100, max(sizes) - 1,
                     *range(0, max(sizes), max(sizes) // 25)}):
        resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))
        try:
            with pytest.raises(OSError, match="make room") as caught:
                save_checkpoint(tmp_path / "c", *parts, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        failed += 1
        assert caught.value.errno == errno.EFBIG
        assert content() == before
        assert names_in(tmp_path) == ["c"]
    assert failed > 25
    save_checkpoint(tmp_path / "c", *parts, 2)
    assert load_checkpoint(tmp_path / "c").step == 2


def test_directories_made_for_a_failed_save_go_again(tmp_path, parts):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError):
            save_checkpoint(tmp_path / "a/b/c", *parts, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names_in(tmp_path) == []
    save_checkpoint(tmp_path / "a/b/c", *parts, 2)
    assert load_checkpoint(tmp_path / "a/b/c").step == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_read_only_directory(tmp_path, parts):
    save_checkpoint(tmp_path / "runs/c", *parts, 1)
    (tmp_path / "runs").chmod(0o555)
    message = tmp_path / "message"
    message.write_text("")
    message.chmod(0o666)
    pid = os.fork()
    if pid == 0:  # a child without root's rights
        try:
            with open(message, "w") as f:
                os.chdir(tmp_path / "runs")
                if os.geteuid() == 0:
                    os.setuid(65534)
                try:
                    save_checkpoint("c", *parts, 2)
                except OSError as error:
                    f.write(str(error))
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    (tmp_path / "runs").chmod(0o755)
    text = message.read_text()
    assert "cannot save" in text and "writable" in text
    assert load_checkpoint(tmp_path / "runs/c").step == 1
    assert names_in(tmp_path / "runs") == ["c"]


def test_a_file_in_the_way(tmp_path, parts):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(OSError, match="cannot save"):
        save_checkpoint(tmp_path / "runs/c", *parts, 2)
    assert names_in(tmp_path) == ["runs"]


@pytest.mark.parametrize("left", ["old", "new", "both", "old damaged",
                                  "path damaged", "newest is gone"])
def test_what_an_interrupted_replacement_left_is_found(tmp_path, parts, left):
    folder = tmp_path / "r/checkpoints"
    path, old, new = (folder / n for n in ("step-5", ".step-5.old",
                                           ".step-5.new"))
    save_checkpoint(path, *parts, 5, info={"which": "old"})
    shutil.copytree(path, old)
    save_checkpoint(tmp_path / "x", *parts, 5, info={"which": "new"})
    if left != "old":
        shutil.copytree(tmp_path / "x", new)
    if left == "path damaged":
        damage(path, "flip")
        shutil.rmtree(new)
    else:
        shutil.rmtree(path)
    if left == "new":
        shutil.rmtree(old)
    if left == "old damaged":
        damage(old, "flip")
    if left == "newest is gone":
        shutil.rmtree(new)
        save_checkpoint(folder / "step-4", *parts, 4)
    which = "new" if left in ("new", "old damaged") else "old"
    for place in (path, tmp_path / "r"):
        with pytest.warns(UserWarning, match="interrupted"):
            back = load_checkpoint(place)
        assert back.info["which"] == which and back.step == 5
    assert list_checkpoints(folder)[0] == path
    prune_checkpoints(folder, 2)  # puts it right
    assert names_in(folder) == (["step-4", "step-5"] if "gone" in left
                                else ["step-5"])
    assert load_checkpoint(path).info["which"] == which
    save_checkpoint(path, *parts, 6)
    assert load_checkpoint(path).step == 6


def test_half_of_a_new_one_is_no_checkpoint(tmp_path, parts):
    new = tmp_path / "r/checkpoints/.step-5.new"
    new.mkdir(parents=True)
    (new / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="not a minillm"):
        load_checkpoint(tmp_path / "r")
    make_run(tmp_path / "r", parts, (3,))
    assert load_checkpoint(tmp_path / "r").step == 3  # without a warning
    prune_checkpoints(tmp_path / "r/checkpoints")
    assert names_in(tmp_path / "r/checkpoints") == ["step-3"]


KILLS = """
import os, random, signal, sys, time, warnings
import torch
from minillm.checkpoint import load_checkpoint, save_checkpoint
from minillm.transformer import GPT, GPTConfig

torch.set_num_threads(1)
folder, n_kills, replace = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1"
model = GPT(GPTConfig(vocab_size=64, context_length=16, d_model=32,
                      n_layers=1, n_heads=2))
rng, first, n_new = random.Random(0), 1, 0
started = time.perf_counter()
save_checkpoint(folder + "/t", model, step=1)
seconds = time.perf_counter() - started
for _ in range(n_kills):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        step = first
        while True:
            os.write(write, b"b%d;" % step)
            name = "last" if replace else f"checkpoints/step-{step:08d}"
            save_checkpoint(f"{folder}/r/{name}", model, step=step)
            os.write(write, b"e%d;" % step)
            step += 1
    os.close(write)
    os.read(read, 1)
    time.sleep(rng.uniform(0, 5 * seconds))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    log = "b"
    while data := os.read(read, 65536):
        log += data.decode()
    os.close(read)
    marks = log.strip(";").split(";")
    begun = max(int(m[1:]) for m in marks if m[0] == "b")
    ended = max([int(m[1:]) for m in marks if m[0] == "e"], default=first - 1)
    if ended == 0 and begun == 1:
        continue  # killed in the very first save
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = load_checkpoint(folder + "/r" + "/last" * replace).step
    assert found in (ended, begun), (found, ended, begun)
    n_new += found == begun != ended
    first = begun + 1
    if begun == found + 1:
        first = begun  # as a resumed run would
print("killed", n_kills, "lost", 0, "begun one found", n_new)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("replace", ["0", "1"])
def test_kill_9_at_random_moments(tmp_path, replace):
    out = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path), "40", replace],
        capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    assert "killed 40 lost 0" in out.stdout


CROWD = """
import os, sys, time
import torch
from minillm.checkpoint import load_checkpoint, save_checkpoint
from minillm.transformer import GPT, GPTConfig

torch.set_num_threads(1)
path = sys.argv[1] + "/c"
shape = GPTConfig(vocab_size=64, context_length=16, d_model=32, n_layers=1,
                  n_heads=2)
models = [GPT(shape, seed=i) for i in range(2)]
for model in models:
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float(models.index(model)))
save_checkpoint(path, models[0], step=0)
writers = []
for i in range(2):
    pid = os.fork()
    if pid == 0:
        for _ in range(30):
            save_checkpoint(path, models[i], step=i)
        os._exit(0)
    writers.append(pid)
n, seen, left = 0, set(), list(writers)
while left:
    back = load_checkpoint(path)
    for p in back.weights.values():
        assert (p == back.step).all()
    n += 1
    seen.add(back.step)
    for pid in left[:]:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert status == 0
            left.remove(pid)
assert os.listdir(sys.argv[1]) == ["c"], os.listdir(sys.argv[1])
print("read", n, "times")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_writers_and_a_reader(tmp_path):
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CROWD, str(tmp_path)],
        capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    assert int(out.stdout.split()[1]) > 3


def test_a_writer_that_holds_on_is_named(tmp_path, monkeypatch):
    pytest.importorskip("fcntl")
    with module._one_writer(tmp_path):
        with pytest.raises(TimeoutError, match="another process"):
            with module._one_writer(tmp_path, patience=0.02):
                raise AssertionError("both have it")
    with module._one_writer(tmp_path, patience=0.02):
        pass


# --- keeping the last k and the best ---


@settings(max_examples=40, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=6), st.integers(1, 3),
       st.none() | st.integers(0, 5))
def test_pruning_keeps_k_whole_ones(parts_session, whole, keep, best):
    tmp, one = parts_session
    folder = tmp / "prune"
    shutil.rmtree(folder, ignore_errors=True)
    for i, good in enumerate(whole):
        shutil.copytree(one, folder / f"step-{i}")
        if not good:
            damage(folder / f"step-{i}", "flip")
    named = f"step-{best}" if best is not None else None
    removed = prune_checkpoints(folder, keep, named)
    left = set(names_in(folder))
    assert left | {p.name for p in removed} == {
        f"step-{i}" for i in range(len(whole))}
    good = [i for i in range(len(whole)) if whole[i]]
    for i in good[-keep:]:
        assert f"step-{i}" in left
    if best is not None and best < len(whole):
        assert named in left
    if len(good) >= keep:
        oldest = good[-keep]
        assert all(i >= oldest or i == best for i in
                   (int(n.split("-")[1]) for n in left))
    else:
        assert not removed


@pytest.fixture(scope="module")
def parts_session(tmp_path_factory, parts):
    tmp = tmp_path_factory.mktemp("prune")
    return tmp, save_checkpoint(tmp / "one", parts[0], step=1)


def test_pruning_arguments_and_leftovers(tmp_path, parts):
    assert prune_checkpoints(tmp_path / "nowhere") == []
    with pytest.raises(ValueError, match="keep is 0"):
        prune_checkpoints(tmp_path, 0)
    run = make_run(tmp_path / "r", parts, (1, 2, 3, 4))
    folder = run / "checkpoints"
    (folder / ".step-0.del").mkdir()
    (folder / ".step-4.new").mkdir()
    removed = prune_checkpoints(folder, 2, best=folder / "step-1")
    assert [p.name for p in removed] == ["step-2"]
    assert names_in(folder) == ["step-1", "step-3", "step-4"]
    assert prune_checkpoints(folder, 2, "step-1") == []


def test_the_best_is_kept_and_found(tmp_path, parts):
    run = tmp_path / "r"
    folder = run / "checkpoints"
    with pytest.raises(FileNotFoundError, match="best.json"):
        best_checkpoint(folder)
    marked = []
    losses = (3.0, 2.0, math.nan, 2.5, 2.2, math.inf)
    for step, loss in enumerate(losses, 1):
        path = save_checkpoint(folder / f"step-{step}", *parts, step)
        marked.append(mark_best(path, loss))
        prune_checkpoints(folder, 2)
    assert marked == [True, True, False, False, False, False]
    assert names_in(folder) == ["best.json", "step-2", "step-5", "step-6"]
    assert load_checkpoint(run, best=True).step == 2
    assert load_checkpoint(run).step == 6
    assert best_checkpoint(folder).name == "step-2"

    damage(folder / "step-2", "flip")  # a damaged best gives way
    with pytest.warns(UserWarning, match="skipped.*step-2"):
        assert load_checkpoint(run, best=True).step == 6
    assert mark_best(folder / "step-5", 9.0)
    assert load_checkpoint(run, best=True).step == 5
    assert mark_best(folder / "step-5", 9.5)  # the same one, saved again
    assert mark_best(folder / "step-6", 9.2)


def test_a_damaged_pointer_deletes_nothing(tmp_path, parts):
    folder = make_run(tmp_path / "r", parts, (1, 2, 3)) / "checkpoints"
    mark_best(folder / "step-1", 1.0)
    pointer = folder / "best.json"
    good = pointer.read_bytes()
    for i in range(len(good)):
        data = bytearray(good)
        data[i] ^= 1
        pointer.write_bytes(data)
        with pytest.warns(UserWarning, match="nothing is deleted"):
            assert prune_checkpoints(folder, 1) == []
    with pytest.warns(UserWarning, match="best.json"):
        assert load_checkpoint(tmp_path / "r", best=True).step == 3
    write_sealed(pointer, {"name": "../../x", "val_loss": 1.0})
    with pytest.raises(ValueError, match="neighbour"):
        best_checkpoint(folder)
    assert mark_best(folder / "step-2", 5.0)  # and is replaced
    assert best_checkpoint(folder).name == "step-2"


def test_only_whole_checkpoints_are_marked(tmp_path, parts):
    with pytest.raises(ValueError, match="not a minillm"):
        mark_best(tmp_path / "nowhere", 1.0)
    assert names_in(tmp_path) == []


# --- pickles ---


def legacy(obj, path):
    torch.save(obj, path, _use_new_zipfile_serialization=False)


def old_numpy(obj, path):
    with open(path, "wb") as f:
        np.save(f, np.array([obj], dtype=object), allow_pickle=True)


WRITERS = {f"protocol {n}": (lambda o, p, n=n: Path(p).write_bytes(
    pickle.dumps(o, protocol=n))) for n in range(6)} | {
    "torch zip": torch.save,
    "torch legacy": legacy,
    "numpy object": old_numpy,
    "gzip": lambda o, p: Path(p).write_bytes(gzip.compress(pickle.dumps(o))),
}  # fmt: skip


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", ["w.pt", "w.bin", "w.PKL", "w.safetensors",
                                  "w"])
def test_pickles_are_never_read(tmp_path, monkeypatch, name, writer):
    monkeypatch.chdir(tmp_path)
    for obj in (Trap(), {"w": [Trap(), 1.0, "x" * 300]}):
        WRITERS[writer](obj, tmp_path / name)
        for read in (refuse_pickle, read_tensors, load_checkpoint):
            with pytest.raises(ValueError, match="loading a pickle runs") as e:
                read(tmp_path / name)
            assert "\n" not in str(e.value) and "safetensors" in str(e.value)
    assert not (tmp_path / "trap.txt").exists()


def test_long_pickles_of_old_protocols_are_seen(tmp_path):
    for protocol in (0, 1):
        data = pickle.dumps([Trap()] + list(range(100_000)), protocol)
        (tmp_path / "w.safetensors").write_bytes(data)
        with pytest.raises(ValueError, match="is a pickle"):
            read_tensors(tmp_path / "w.safetensors")


@pytest.mark.parametrize("suffix", [".pt", ".PTH", ".bin", ".ckpt", ".npz"])
def test_names_of_pickles_are_refused(tmp_path, suffix):
    save_file({"w": torch.ones(2)}, tmp_path / f"w{suffix}")
    with pytest.raises(ValueError, match="by its name"):
        read_tensors(tmp_path / f"w{suffix}")


def test_a_pickle_inside_a_checkpoint(tmp_path, monkeypatch, parts):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "c", *parts)
    for data in (pickle.dumps(Trap()), pickle.dumps(Trap(), 0)):
        path = tmp_path / "c/training.safetensors"
        path.write_bytes(data)
        head = read_sealed(tmp_path / "c/checkpoint.json")
        head["sha256"][path.name] = hashlib.sha256(data).hexdigest()
        head["bytes"][path.name] = len(data)
        rewrite_head(tmp_path / "c", sha256=head["sha256"],
                     bytes=head["bytes"])
        with pytest.raises(ValueError, match="pickle"):
            load_checkpoint(tmp_path / "c")
    assert not (tmp_path / "trap.txt").exists()


def test_nothing_here_can_unpickle():
    """The module neither imports pickle nor calls torch.load."""
    source = Path(module.__file__).read_text()
    assert "import pickle\n" not in source and "torch.load(" not in source


# --- weights ---


def test_weights_of_another_model_are_refused(tmp_path, parts):
    back = load_checkpoint(save_checkpoint(tmp_path / "c", parts[0], step=1))
    assert isinstance(back, Checkpoint)
    wide = GPT(dataclasses.replace(TINY, d_model=16))
    with pytest.raises(ValueError, match="not this model's"):
        load_weights(wide, back.weights, back.path)
    few = dict(list(back.weights.items())[1:])
    with pytest.raises(ValueError, match="1 tensors differ"):
        load_weights(GPT(TINY), few)
