"""Run everything that proves the project: lint, notebooks, tests, offline.

    python tools/run_tests.py [--no-notebooks] [--slow]

1. ruff on notebooks, tests and tools
2. the model that several chapters share, trained once with all cores
3. nbdev_test: every notebook, two side by side, one torch thread each
4. pytest

The whole run has a socket guard on its PYTHONPATH: nothing may leave the
machine. Ends with the first step that fails and with that step's exit code.
"""

import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sysconfig.get_path("scripts"))
WORKERS = "2"


def run(title: str, command: list[str], **extra_env: str) -> None:
    """Run one step; leave with its exit code if it fails."""
    env = {**os.environ, **extra_env}
    env["PYTHONPATH"] = str(ROOT / "tests" / "guard")
    env["PYTHONUTF8"] = "1"
    env["HF_HUB_OFFLINE"] = env["HF_DATASETS_OFFLINE"] = "1"
    # Interactive backends have no place in a test.
    env["MPLBACKEND"] = "agg"
    print(f"== {title}", flush=True)
    start = time.perf_counter()
    code = subprocess.run(command, cwd=ROOT, env=env).returncode
    print(f"== {title}: {time.perf_counter() - start:.0f} s", flush=True)
    if code:
        print(f"== {title} failed with exit code {code}", file=sys.stderr)
        sys.exit(code)


def main() -> None:
    python = sys.executable
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    run("lint", [python, "-m", "ruff", "check", "."])
    if "--no-notebooks" not in sys.argv:
        warm = "from minillm.train import tales_model; tales_model()"
        run("shared model", [python, "-c", warm])
        command = [
            str(BIN / "nbdev_test"), "--n_workers", WORKERS,
            "--do_print", "--timing",
        ]  # fmt: skip
        if "--slow" in sys.argv:
            command += ["--flags", "slow"]
        run("notebooks", command, **one_thread)
    run("tests", [python, "-m", "pytest", "-q", "tests"], **one_thread)
    print("== all passed")


if __name__ == "__main__":
    main()
