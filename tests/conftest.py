"""What every test shares: the socket guard and seeds that do not leak."""

import importlib.util
import random
import signal
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent

if not hasattr(socket.socket, "_guard"):  # pytest started without the guard
    _spec = importlib.util.spec_from_file_location(
        "guard", ROOT / "tests" / "guard" / "sitecustomize.py"
    )
    _spec.loader.exec_module(importlib.util.module_from_spec(_spec))

# The same examples on every run; a failing one is printed to be replayed.
settings.register_profile(
    "project",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.load_profile("project")


@pytest.fixture(autouse=True)
def _fresh_seeds():
    """Give every test the same random state and the default dtype."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    yield


@pytest.fixture(autouse=True)
def _ctrl_c_works():
    """A shell's background jobs start with Ctrl-C ignored; tests send it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def root() -> Path:
    """The project's root."""
    return ROOT


def pytest_terminal_summary(terminalreporter):
    """Say how much the comparison with GPT-2's tokenizer has compared."""
    compared = getattr(sys.modules.get("test_gpt2"), "COMPARED", {})
    for name in sorted({name for name, _ in compared}):
        counts = ", ".join(f"{n:,} {what}" for (who, what), n
                           in compared.items() if who == name)
        terminalreporter.write_line(f"equal to tiktoken ({name}): {counts}")
