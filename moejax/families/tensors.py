"""The tensors in the safetensors files of a checkpoint of transformers, mapped.

Nothing is unpickled, and nothing outside of the folder is read (`file_in`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moejax.errors import UserError
from moejax.inference.folder_files import file_in, listed, read_json
from moejax.inference.safetensors_file import open_safetensors

__all__ = ["INDEX", "SINGLE", "open_tensors"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def open_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Maps the tensors of a folder by name; their bytes are read when they are used.

    Raises:
        UserError: files are missing, damaged, pickled or outside of the folder, or the index and
            the files differ.
    """
    if file_in(folder, INDEX).exists():
        return _open_listed(folder)
    single = file_in(folder, SINGLE)
    if single.exists():
        return open_safetensors(single)
    if any(any(folder.glob(pattern)) for pattern in _PICKLED):
        raise UserError(
            f"{folder}: the weights are pickled, and loading those would run what is in them: "
            "convert them to safetensors, with transformers' save_pretrained, on a machine that "
            "may run them"
        )
    others = [path.name for path in sorted(folder.glob("*.safetensors"))]
    found = f"only {listed(others)}, and no {INDEX}" if others else "no safetensors files"
    raise UserError(f"{folder}: {found}: fetch the whole model again")


def _open_listed(folder: Path) -> dict[str, np.ndarray]:
    index = folder / INDEX
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(f, str) for f in names.values()):
        raise UserError(f"{index}: damaged: no weight_map; fetch it again")
    files = sorted(set(names.values()))
    missing = [file for file in files if not file_in(folder, file).exists()]
    if missing:
        raise UserError(f"{index}: names {listed(missing)}, which are missing: fetch them again")
    tensors: dict[str, np.ndarray] = {}
    wrong = []
    for file in files:
        found = open_safetensors(folder / file)
        wrong += [f"{n} is in {file} and in another" for n in found if n in tensors]
        wrong += [
            f"{n} is in {file} and not in the index" if n not in names else f"{n} is not in {f}"
            for n in found
            if (f := names.get(n)) != file
        ]
        tensors |= found
    wrong += [f"{name} is in none of them" for name in names if name not in tensors]
    if wrong:
        raise UserError(
            f"{index}: the index and the files differ: {listed(sorted(wrong))}; fetch the model "
            "again"
        )
    return tensors
