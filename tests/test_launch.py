"""The scripts in launch/: every flag they pass is one of train.py's, and they end as they say."""

import os
import re
import shlex
import signal
import subprocess
import textwrap
import time
from pathlib import Path

import pytest

from sharding.mesh import MeshShape
from train import read_all_flags

ROOT = Path(__file__).parent.parent
SLURM = (ROOT / "launch" / "slurm.sbatch").read_text()
JOBSET = (ROOT / "launch" / "jobset.yaml").read_text()


def command_of(script: str, **variables: str) -> list[str]:
    """What a shell script passes to train.py."""
    (line,) = re.findall(r".* train\.py (.*)", script.replace("\\\n", " "))
    for name, value in variables.items():
        line = line.replace(f'"${name}"', value)
    assert "$" not in line, line
    return shlex.split(line.rstrip(" &"))


def number_after(text: str, words: str) -> int:
    (found,) = re.findall(rf'{words}"?(\d+)\b', text)
    return int(found)


def shell_of_jobset() -> str:
    """What the container's bash runs."""
    block = JOBSET[JOBSET.index("- |\n") + 4 :]
    depth = len(block) - len(block.lstrip())
    inside = [line for line in block.splitlines()]
    end = next(i for i, line in enumerate(inside) if line and not line.startswith(" " * depth))
    return textwrap.dedent("\n".join(inside[:end]))


def test_slurm(tmp_path):
    subprocess.run(["bash", "-n", ROOT / "launch" / "slurm.sbatch"], check=True)
    # Commands that comments show.
    shown = re.findall(r"sbatch (.*)launch/slurm\.sbatch (--.*)", SLURM)
    shown += re.findall(
        r"sbatch (.*)launch/slurm\.sbatch (--.*)", (ROOT / "launch" / "README.md").read_text()
    )
    assert len(shown) == 2
    gpus = number_after(SLURM, "--gpus-per-node=")
    assert gpus == number_after(SLURM, "--ntasks-per-node=")
    for options, flags in shown:
        argv = command_of(SLURM.replace('"$@"', flags), RUN=str(tmp_path / "run"))
        config, joining, _ = read_all_flags(argv)
        assert joining.distributed and joining.processes is None, "Slurm says who takes part"
        assert MeshShape.parse(config.mesh).size == number_after(options, "--nodes=") * gpus
    more = [*command_of(SLURM.replace('"$@"', ""), RUN=str(tmp_path)), "--local-devices", "0", "1"]
    assert read_all_flags(more)[1].local_devices == (0, 1)


def test_jobset(tmp_path):
    hosts = number_after(JOBSET, "parallelism: ")
    assert hosts == number_after(JOBSET, "completions: ")
    assert hosts == number_after(JOBSET, r"name: HOSTS\n +value: ")
    argv = command_of(
        shell_of_jobset(), HOSTS=str(hosts), JOB_COMPLETION_INDEX="3", RUN=str(tmp_path / "run")
    )
    config, joining, _ = read_all_flags(argv)
    assert (joining.processes, joining.process) == (hosts, 3)
    assert MeshShape.parse(config.mesh).size == hosts * number_after(JOBSET, "nvidia.com/gpu: ")
    # Process 0 by the JobSet's own names: set, job of the replicas, number of the job, of the pod.
    (name,) = re.findall(r"kind: JobSet\nmetadata:\n  name: (\S+)", JOBSET)
    (job,) = re.findall(r"replicatedJobs:\n    - name: (\S+)", JOBSET)
    port = number_after(JOBSET, "containerPort: ")
    assert joining.coordinator == f"{name}-{job}-0-0.{name}:{port}"
    # The run is where the volume of all pods is.
    (run,) = re.findall(r"name: RUN\n +value: (\S+)", JOBSET)
    (mount,) = re.findall(r"name: shared, mountPath: (\S+)}", JOBSET)
    assert run.startswith(f"{mount}/")


PYTHON = """#!/bin/bash
case $HOW in
    done) mkdir -p "$RUN" && touch "$RUN/summary.json";;
    done_elsewhere) ;;
    stopped) trap 'sleep 0.3; exit 0' TERM; touch "$READY"; while :; do sleep 0.05; done;;
    failed) exit 2;;
    killed) kill -9 $$;;
esac
"""


@pytest.mark.parametrize(
    ("how", "index", "ends_well"),
    [
        ("done", 0, True),
        ("done_elsewhere", 1, True),  # whose host does not see the file yet
        ("stopped", 0, False),  # so that all are started again
        ("failed", 0, False),
        ("failed", 1, False),
        ("killed", 1, False),
    ],
)
def test_pods_of_a_jobset_end(tmp_path, how, index, ends_well):
    python, ready = tmp_path / "python", tmp_path / "ready"
    python.write_text(PYTHON)
    python.chmod(0o755)
    environment = {
        **{"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOW": how, "READY": str(ready)},
        **{"RUN": str(tmp_path / "run"), "HOSTS": "2", "JOB_COMPLETION_INDEX": str(index)},
    }
    with subprocess.Popen(["bash", "-c", shell_of_jobset()], env=environment) as shell:
        begun = time.monotonic()
        if how == "stopped":
            while not ready.exists():
                assert shell.poll() is None and time.monotonic() - begun < 30
                time.sleep(0.02)
            shell.send_signal(signal.SIGTERM)
        code = shell.wait(60)
    assert (code == 0) == ends_well
