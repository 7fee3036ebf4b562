"""Seeds of random inputs: other ones after every change of the program, else the same ones.

A run is then repeated by running it again, by anyone who has that commit, and a test that fails of
one draw in many fails while the change is made, not on somebody else's machine later. Tests do not
count: to mend one draws nothing anew for the others.
`MOEJAX_TEST_SEED=random` draws anew at each run, any other text is taken instead of the sources.
"""

import hashlib
import os
from functools import cache
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
PARTS = ("moejax", "sharding", "pallas_kernels", "train.py", "infer.py")
CHOSEN = os.environ.get("MOEJAX_TEST_SEED", "")


@cache
def content() -> bytes:
    """Of the library's and the scripts' sources, or what the environment says instead."""
    if CHOSEN:
        return os.urandom(32) if CHOSEN == "random" else CHOSEN.encode()
    digest = hashlib.sha256()
    for part in PARTS:
        top = ROOT / part
        for path in sorted(top.rglob("*.py")) if top.is_dir() else [top]:
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.digest()


def seed_of(name: str) -> int:
    """Of whoever goes by that name, below 2³²."""
    return int.from_bytes(hashlib.sha256(content() + name.encode()).digest()[:4], "little")


def draws(name: str) -> np.random.Generator:
    """The same numbers whenever that name is given."""
    return np.random.default_rng(seed_of(name))
