"""What all benchmarks share: how results are written, and the mesh of those of several devices.

benchmarks/results/NAME.json = {"device", "jax", "commit", "command", "rows": [...]}
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def device_name() -> str:
    """The accelerator's name, or the processor's and its number of cores."""
    import os

    import jax

    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.machine()} CPU, {cores} cores"


def commit() -> str:
    """The short hash of the checked-out commit, with + when files differ from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return (git("rev-parse", "--short", "HEAD") or "unknown") + (
        "+" if git("status", "--porcelain", "--untracked-files=no") else ""
    )


def write_results(
    name: str, rows: Sequence[dict[str, Any]], command: str | None = None, **more: Any
) -> Path:
    """Writes one result file.

    Args:
        name: without `.json`.
        rows: measurements.
        command: that made them; None takes this process's arguments.
        more: replaces or adds top-level entries, such as `device` for figures made elsewhere.
    """
    import jax

    content = {
        "device": device_name(),
        "jax": jax.__version__,
        "commit": commit(),
        "command": command or "python " + " ".join(sys.argv),
        **more,
        "rows": list(rows),
    }
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path


def expert_mesh(devices: int | None, tiny: bool) -> Any:
    """A mesh of some devices, or all, along `expert`; fake ones, 4 if not said, for a rehearsal.

    Raises:
        SystemExit: it is no rehearsal, and there is no accelerator.
    """
    import jax

    from sharding.mesh import MeshShape, make_mesh

    if tiny:
        jax.config.update("jax_num_cpu_devices", devices or 4)
    elif jax.devices()[0].platform == "cpu":
        raise SystemExit("no accelerator here: --tiny rehearses on the CPU")
    return make_mesh(MeshShape(expert=devices or len(jax.devices())))


def beginning(flat: Mapping[str, Any], blueprint: Any) -> Any:
    """The state of a run that begins with weights in logical order: step 0, moments of zero."""
    import numpy as np

    from moejax.training.state import from_logical

    start = {name: np.asarray(value, np.float32) for name, value in flat.items()}
    for part in ("mu", "nu"):
        start |= {
            name.replace("params/", f"{part}/"): np.zeros_like(value)
            for name, value in start.items()
            if name.startswith("params/")
        }
    return from_logical(start | {"step": np.zeros((), np.int32)}, blueprint)
