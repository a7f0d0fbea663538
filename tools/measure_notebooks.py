"""Time every notebook, alone, with all cores; write nbs/results.

    python tools/measure_notebooks.py

Run it on an otherwise idle machine. The shared model is trained first.
"""

import json
import os
import platform
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from clean_notebooks import notebooks  # noqa: E402


def main() -> None:
    import torch

    from minillm.bench import processor
    from minillm.files import write_json
    from minillm.train import tales_model

    tales_model()
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "guard")}
    nbdev_test = Path(sysconfig.get_path("scripts")) / "nbdev_test"
    out = ROOT / "nbs" / "results" / "notebook_times.json"
    names = {}
    for path in notebooks():
        short = path.relative_to(ROOT / "nbs").with_suffix("").as_posix()
        start = time.perf_counter()
        subprocess.run(
            [nbdev_test, "--path", path, "--n_workers", "1"],
            cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        names[short] = round(time.perf_counter() - start, 1)
        print(f"{names[short]:6.1f} s  {short}", flush=True)
    machine = (
        f"{processor()}, {os.cpu_count()} cores used, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
    write_json(out, {"machine": machine, "seconds": names})
    print(json.dumps({"total": round(sum(names.values()))}))


if __name__ == "__main__":
    main()
