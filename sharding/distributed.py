"""Many processes as one program: how they join, who they are, how they agree and how they end.

    with joined(flags):              # before JAX looks for devices
        path = from_first("run", path)
        if is_first():
            print(path)

Slurm, Open MPI or Kubernetes start processes, which JAX recognises, or explicit flags tell it.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import traceback
from collections.abc import Iterator
from typing import Any

from moejax.errors import AgreedError, UserError
from moejax.training.files import is_disk_full
from sharding.join_flags import JoinFlags
from sharding.lifeline import Lifeline, one_line
from sharding.meeting import meet

__all__ = [
    "JoinFlags",
    "check_same",
    "collect",
    "fails_together",
    "fake_devices",
    "from_first",
    "host_of",
    "is_first",
    "joined",
    "num_processes",
    "say",
    "several",
    "smallest",
]

# A collective, or a save, breaks where another process has ended. In so many seconds it is known to
# have: then that one is the reason.
_BROKEN_SECONDS = 5.0
_USER_SECONDS = 0.5


_lifeline: Lifeline | None = None


@contextlib.contextmanager
def joined(flags: JoinFlags) -> Iterator[None]:
    """This process is one of several inside; what fails inside ends all of them.

    Without `--distributed` nothing is done.

    Raises:
        UserError: the flags do not go together, no cluster is found, or the processes do not find
            each other.
    """
    global _lifeline
    flags.check_joining()
    if not flags.distributed:
        yield
        return
    _lifeline = _join(flags)
    with fails_together():
        yield
        _lifeline.close()
    _lifeline = None


@contextlib.contextmanager
def fails_together() -> Iterator[None]:
    """An exception inside ends all processes, without leaving what encloses this.

    What is to be closed might wait for processes that cannot come any more.
    """
    try:
        yield
    except BaseException as error:
        if _lifeline is None or (isinstance(error, SystemExit) and not error.code):
            raise
        _fail(_lifeline, error)


def num_processes() -> int:
    """How many processes have joined."""
    return 1 if _lifeline is None else _lifeline.processes


def several() -> bool:
    """Whether this process is one of several."""
    return num_processes() > 1


def is_first() -> bool:
    """Whether this is the process that writes and speaks: the only one, or process 0."""
    if _lifeline is not None:
        return _lifeline.process == 0
    import jax

    # Somebody else may have joined processes. Without that no device needs to be looked for.
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def say(line: str) -> None:
    """Prints a line at once, in the first process."""
    if is_first():
        print(line, flush=True)


def from_first(name: str, value: Any) -> Any:
    """What process 0 gave; all processes call it. See `Lifeline.from_first`."""
    return value if _lifeline is None else _lifeline.from_first(name, value)


def collect(name: str, value: Any) -> list[Any]:
    """What each process gave, in process 0; all processes call it. See `Lifeline.collect`."""
    return [value] if _lifeline is None else _lifeline.collect(name, value)


def smallest(name: str, value: int) -> int:
    """The smallest number that a process gave; all processes call it."""
    return from_first(name, min(collect(name, value), default=value))


def check_same(name: str, value: dict[str, Any], remedy: str) -> None:
    """Refuses to go on unless all processes gave the same; all of them call it.

    Args:
        name: of what is compared.
        value: what JSON can hold.
        remedy: how to mend it.

    Raises:
        AgreedError: in each process.
    """
    wrong, value = "", json.loads(json.dumps(value))  # tuples travel as lists
    for number, other in enumerate(collect(name, value)):
        differing = [key for key in value if other.get(key) != value[key]]
        if differing and not wrong:
            key = differing[0]
            wrong = (
                f"{name}: {key} is {value[key]!r:.200} in process 0 and "
                f"{other.get(key)!r:.200} in process {number}: {remedy}"
            )
    if wrong := from_first(name, wrong):
        raise AgreedError(wrong)


def fake_devices(total: int, *, asked: bool = True) -> int:
    """How many of so many fake devices this process makes.

    Args:
        total: of all processes together.
        asked: whether somebody asked for just so many; else a few more may be made.

    Raises:
        UserError: they cannot be split evenly.
    """
    processes = num_processes()
    if not asked:
        return -(-total // processes)
    if total % processes:
        raise UserError(
            f"--devices {total} over {processes} processes: each makes as many; give a multiple of "
            f"{processes}"
        )
    return total // processes


def host_of(device: Any) -> int:
    """A number for the machine that a device is in; the same for those that share one."""
    if _lifeline is None:
        return device.process_index
    return _lifeline.host_numbers[device.process_index]


def _join(flags: JoinFlags) -> Lifeline:
    import jax

    address, processes, process, local = _where(flags)
    facts = {"the version of JAX": jax.__version__}
    told = {"port": _free_port()} if process == 0 else {}
    meeting = meet(address, processes, process, flags.join_timeout, facts, told)
    lifeline = Lifeline(meeting)
    # Fake devices talk by gloo; accelerators do not look at this.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # A run has its own way to stop at a signal; JAX's would swallow those that come before it.
    jax.config.update("jax_enable_preemption_service", False)
    host = address.rpartition(":")[0]
    try:
        jax.distributed.initialize(
            f"{host}:{meeting.told['port']}",
            processes,
            process,
            local,
            cluster_detection_method="deactivate",
            initialization_timeout=max(30, int(flags.join_timeout)),
        )
    except BaseException as error:
        _fail(lifeline, error)
    return lifeline


def _where(flags: JoinFlags) -> tuple[str, int, int, list[int] | None]:
    """Address, number of processes, number of this one, devices: as flags or a cluster say."""
    local = list(flags.local_devices) or None
    if flags.processes is not None and flags.process is not None:
        return flags.coordinator, flags.processes, flags.process, local
    # Public functions only detect and start at once, where a late process ends in a stack trace.
    from jax._src.clusters import ClusterEnv

    try:
        address, processes, process, found = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, local, None, int(flags.join_timeout)
        )
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        raise UserError(
            f"--distributed: the cluster does not say who takes part ({one_line(str(error))}); "
            "give --coordinator, --processes and --process"
        ) from error
    if address is None or processes is None or process is None:
        raise UserError(
            "--distributed: started neither by Slurm, Open MPI nor Kubernetes; give --coordinator "
            "HOST:PORT, --processes N and --process I, or leave --distributed out"
        )
    return address, processes, process, None if found is None else list(found)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def _fail(lifeline: Lifeline, error: BaseException) -> None:
    """Ends all processes because of an exception in this one."""
    line = one_line(str(error) or type(error).__name__)
    why, code, text = line, 2, f"error: {line}\n"
    wait = _USER_SECONDS
    if isinstance(error, KeyboardInterrupt):
        why, code, text, wait = "interrupted", 130, "interrupted\n", 0.0
    elif isinstance(error, AgreedError):
        lifeline.fail_as_one(code, lambda: sys.stderr.write(text))
    elif isinstance(error, UserError):
        pass
    elif is_disk_full(error):
        why = f"the disk is full ({line}): free some space and start again"
        text = f"error: {why}\n"
    else:
        why, code, wait = f"{type(error).__name__}: {line}", 1, _BROKEN_SECONDS
        text = "".join(traceback.format_exception(error))
    lifeline.fail(why, code, lambda: sys.stderr.write(text), wait=wait)
