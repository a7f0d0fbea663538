"""The socket guard guards: here, in subprocesses, in notebook workers."""

import json
import os
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

# 192.0.2.0/24 is reserved for documentation (RFC 5737): nobody is there.
ELSEWHERE = "192.0.2.1"
TRY = f"import socket; socket.create_connection(('{ELSEWHERE}', 80), 1)"


def guarded_env(root):
    return {**os.environ, "PYTHONPATH": str(root / "tests" / "guard")}


def test_here():
    with pytest.raises(RuntimeError, match="runs offline"):
        socket.create_connection((ELSEWHERE, 80), timeout=1)
    with pytest.raises(RuntimeError, match="runs offline"):
        socket.getaddrinfo("example.org", 80)
    with pytest.raises(RuntimeError, match="runs offline"):
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.sendto(b"x", (ELSEWHERE, 53))


def test_loopback_still_works():
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname(), timeout=5)
        client.close()


def test_subprocess(root):
    done = subprocess.run(
        [sys.executable, "-c", TRY],
        env=guarded_env(root), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "NetworkBlocked" in done.stderr


@pytest.mark.parametrize("source, code", [(TRY, 1), ("assert 1 + 1 == 2", 0)])
def test_notebook_worker(root, tmp_path, source, code):
    """nbdev_test fails on a notebook that leaves the machine, only then."""
    cell = {
        "cell_type": "code", "id": "a1", "metadata": {}, "outputs": [],
        "execution_count": None, "source": source,
    }  # fmt: skip
    nb = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    nb["metadata"]["kernelspec"] = {
        "name": "python3", "display_name": "python3", "language": "python"
    }  # fmt: skip
    (tmp_path / "settings.ini").write_text(
        (root / "settings.ini").read_text(encoding="utf-8"), encoding="utf-8"
    )
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs" / "leak.ipynb").write_text(json.dumps(nb))
    nbdev_test = Path(sysconfig.get_path("scripts")) / "nbdev_test"
    done = subprocess.run(
        [nbdev_test, "--n_workers", "1"],
        cwd=tmp_path, env=guarded_env(root), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
