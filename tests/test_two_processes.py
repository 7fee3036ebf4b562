"""Two processes of four fake devices: each reads the parts of a folder that its devices hold."""

import dataclasses
import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from inference_support import CONFIG, random_weights

from moejax.families.export import save_hf_folder

MIXTRAL = dataclasses.replace(
    CONFIG,
    moe=dataclasses.replace(
        CONFIG.moe, router=dataclasses.replace(CONFIG.moe.router, selection_bias=False)
    ),
)
ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_each_process_reads_what_its_devices_hold(rng, tmp_path):
    folder, flat = tmp_path / "hf", random_weights(MIXTRAL, rng)
    save_hf_folder(folder, flat, MIXTRAL, family="mixtral")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, str(ROOT / "tests" / "two_processes.py"), port]
    processes = [
        subprocess.Popen([*command, str(rank), str(folder)], stdout=subprocess.PIPE, cwd=ROOT)
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0]
    for found in map(json.loads, outputs):
        assert found.keys() == flat.keys()
        for name, of in found.items():
            assert of["read"] == of["held"], name
            experts = ".bank." in name
            assert of["held"] == of["all"] // (2 if experts else 1), name
    for name, array in flat.items():
        whole = {}
        for found in map(json.loads, outputs):
            whole |= found[name]["sums"]
        total = sum(whole.values())
        if name == "params/embedding.w":
            array = array[: MIXTRAL.vocab_size]  # a folder has no rows of padding
        if name == "params/head.w":
            array = array[:, : MIXTRAL.vocab_size]
        want = array.astype(np.float64).sum()
        np.testing.assert_allclose(total, want, rtol=1e-4, atol=1e-3, err_msg=name)
