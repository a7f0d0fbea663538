"""Time every notebook as `make test` runs them; write nbs/results.

    python tools/measure_notebooks.py

Two notebooks run side by side, each with one torch thread. Run it on an
otherwise idle machine. The shared model is trained first.
"""

import os
import platform
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from clean_notebooks import notebooks  # noqa: E402


def seconds(path: Path) -> float:
    """Run one notebook in a process of its own; return the time it took."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "guard"),
           "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
           "MPLBACKEND": "agg"}  # fmt: skip
    command = [Path(sysconfig.get_path("scripts")) / "nbdev_test",
               "--path", path, "--n_workers", "1"]  # fmt: skip
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=env, text=True,
                          capture_output=True)  # fmt: skip
    took = round(time.perf_counter() - start, 1)
    name = path.relative_to(ROOT / "nbs")
    print(f"{took:6.1f} s  {name}", flush=True)
    if done.returncode:
        print(done.stdout[-3000:], done.stderr[-3000:], flush=True)
        raise RuntimeError(f"{name} failed")
    return took


def main() -> None:
    import torch

    from minillm.bench import processor
    from minillm.files import write_json
    from minillm.train import tales_model

    tales_model()
    paths = notebooks()
    with ThreadPoolExecutor(2) as pool:
        jobs = {path: pool.submit(seconds, path) for path in paths}
    times = {
        path.relative_to(ROOT / "nbs").with_suffix("").as_posix(): job.result()
        for path, job in jobs.items()
    }
    machine = (
        f"{processor()}, one core for each notebook, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
    write_json(ROOT / "nbs" / "results" / "notebook_times.json",
               {"machine": machine, "seconds": times})  # fmt: skip
    print(f"{sum(times.values()) / 60:.0f} minutes of one core")


if __name__ == "__main__":
    main()
