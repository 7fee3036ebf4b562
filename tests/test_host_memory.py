import subprocess
import sys
from importlib.util import find_spec

import pytest

from moejax.training import host_memory

CODE = """
import resource, sys
import numpy as np
from moejax.training import host_memory
if sys.argv[1] == "keep":
    assert host_memory.keep_freed_memory()
for _ in range(20):  # 40 MB blocks, above glibc's largest threshold, touched and freed
    np.ones(5_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or any(map(find_spec, host_memory._PLUGINS)),
    reason="glibc only, and hosts with accelerators are left alone",
)
def test_freed_blocks_are_reused_instead_of_faulted_in_again():
    def faults(mode: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", CODE, mode], capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert faults("keep") < faults("plain") / 3
