"""The folders of a run's checkpoints: which are complete, and what is cleared away.

    step_00000120/       a checkpoint, complete once it has a manifest
    damaged_00000120/    one that was not as it was written, set aside

Names of other forms are left alone.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from moejax.training import manifest

__all__ = ["complete_steps", "remove", "remove_incomplete", "set_aside", "step_path"]

_STEP = re.compile(r"step_(\d{8,})")


def step_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"step_{step:08d}"


def complete_steps(folder: Path) -> list[int]:
    """Steps that have a manifest, ascending; nothing is read but names."""
    if not folder.is_dir():
        return []
    found = ((_STEP.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted(int(m[1]) for m, path in found if m and manifest.path_in(path).is_file())


def remove(folder: Path, step: int) -> None:
    """Deletes a checkpoint; what a kill in between leaves is an incomplete one."""
    path = step_path(folder, step)
    manifest.path_in(path).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def remove_incomplete(folder: Path) -> None:
    """Deletes what killed saves left behind; for the process that writes here alone."""
    complete = {step_path(folder, step) for step in complete_steps(folder)}
    for path in folder.iterdir():
        if _STEP.fullmatch(path.name) and path not in complete:
            shutil.rmtree(path, ignore_errors=True)


def set_aside(folder: Path, step: int) -> None:
    """Renames a damaged checkpoint, so that it counts no more; an older one of the name goes."""
    aside = folder / f"damaged_{step:08d}"
    shutil.rmtree(aside, ignore_errors=True)
    step_path(folder, step).rename(aside)
