"""How processes meet, agree and end together; without JAX, mostly as threads of one process."""

import contextlib
import dataclasses
import os
import queue
import socket
import threading
import time

import pytest
from processes_support import free_port

from moejax.errors import UserError
from sharding import distributed
from sharding.join_flags import JoinFlags
from sharding.lifeline import Lifeline
from sharding.meeting import Meeting, meet

FACTS = {"the version of JAX": "1"}


def meet_all(*visits, seconds=20.0):
    """Each visit's meeting or error; (processes, process) or with facts of its own."""
    address = f"127.0.0.1:{free_port()}"
    found = [None] * len(visits)

    def visit(i, processes, process, facts=FACTS):
        try:
            found[i] = meet(address, processes, process, seconds, facts, {"port": 7})
        except UserError as error:
            found[i] = str(error)

    threads = [threading.Thread(target=visit, args=(i, *v)) for i, v in enumerate(visits)]
    for thread in threads:
        thread.start()
        time.sleep(0.02)
    for thread in threads:
        thread.join(60)
    return found


def hang_up(meetings):
    for meeting in meetings:
        for peer in meeting.peers.values():
            peer.close()


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_all_meet(rng, processes):
    found = meet_all(*[(processes, int(i)) for i in rng.permutation(processes)])
    assert all(isinstance(one, Meeting) for one in found), found
    assert {one.process for one in found} == set(range(processes))
    for one in found:
        assert one.processes == processes == len(one.hosts) and one.told == {"port": 7}
        others = set(range(processes)) - {0} if one.process == 0 else {0}
        assert set(one.peers) == others
    hang_up(found)


@pytest.mark.parametrize(
    ("visits", "words"),
    [
        ([(2, 0), (3, 1)], ["process 1 on", "started with 3 and process 0 with 2", "all the same"]),
        ([(3, 0), (3, 1), (3, 1)], ["--process 1: given twice", "from 0 to 2"]),
        ([(2, 0), (2, 1, {"the version of JAX": "2"})], ["version of JAX", "has 2", "has 1"]),
    ],
)
def test_processes_that_do_not_fit_are_told_so(visits, words):
    found = meet_all(*visits)
    for one in found:
        assert isinstance(one, str), found
        for word in words:
            assert word in one
    assert len(set(found)) == 1  # the same line everywhere


def test_a_process_that_is_missing():
    start = time.monotonic()
    found = meet_all((3, 0), (3, 2), seconds=1.0)
    assert time.monotonic() - start < 8
    for one in found:
        assert "2 have come within 1 s, not process 1" in one and "--join-timeout" in one


def test_a_coordinator_that_is_not_there():
    start = time.monotonic()
    (found,) = meet_all((2, 1), seconds=0.5)
    assert time.monotonic() - start < 5
    assert (
        "process 0 cannot be reached within 0.5 s" in found and "--coordinator 127.0.0.1" in found
    )


def test_a_port_that_is_taken_and_addresses_that_are_none():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match="process 0 cannot listen there"):
            meet(f"127.0.0.1:{port}", 2, 0, 1.0, FACTS, {})
    for address in ("here", "here:", ":7", "here:x", "here:70000"):
        with pytest.raises(UserError, match="write HOST:PORT"):
            meet(address, 2, 1, 1.0, FACTS, {})


def test_strangers_are_not_let_in():
    address, found = f"127.0.0.1:{free_port()}", queue.Queue()
    threads = [
        threading.Thread(target=lambda i=i: found.put(meet(address, 2, i, 20.0, FACTS, {})))
        for i in range(2)
    ]
    threads[0].start()
    time.sleep(0.2)
    port = int(address.rpartition(":")[2])
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"\x00\x00\x00\x02[]", b""):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(words)
    threads[1].start()
    for thread in threads:
        thread.join(30)
    meetings = [found.get_nowait() for _ in range(2)]
    assert {m.process for m in meetings} == {0, 1}
    hang_up(meetings)


@pytest.fixture
def lifelines():
    """Makes lifelines whose end is noted and does not end this process."""
    made = []

    def make(processes):
        ends = queue.Queue()
        meetings = meet_all(*[(processes, i) for i in range(processes)])
        lines = [
            Lifeline(m, end=lambda code, m=m: ends.put((m.process, code, time.monotonic())))
            for m in meetings
        ]
        made.extend(lines)
        return lines, ends

    yield make
    for line in made:
        line._hang_up()
    for line in made:
        line._thread.join(20)
        for peer in line._peers.values():
            peer.close()


def in_threads(lines, do):
    found = [None] * len(lines)

    def one(line):
        found[line.process] = do(line)

    threads = [threading.Thread(target=one, args=(line,)) for line in lines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def test_values_travel(rng, lifelines):
    lines, ends = lifelines(4)
    numbers = rng.integers(0, 1000, 200).tolist()

    def talk(line):
        heard = []
        for i, number in enumerate(numbers):
            heard.append(line.collect("number", [number, line.process]))
            first = line.from_first("first", {"i": i, "n": number} if line.process == 0 else None)
            heard.append(first)
        line.close()
        return heard

    found = in_threads(lines, talk)
    first, others = [], []
    for i, number in enumerate(numbers):
        first += [[[number, process] for process in range(4)], {"i": i, "n": number}]
        others += [[], {"i": i, "n": number}]
    assert found == [first, others, others, others]
    assert ends.empty()


def test_processes_at_different_places_are_noticed(lifelines):
    lines, _ = lifelines(2)
    lines[0].from_first("here", 1)
    with pytest.raises(RuntimeError, match="exchanges 'there' and process 0 'here'"):
        lines[1].from_first("there", None)


def fail_in(line, why, said, wait=0.0):
    """A failure, as of the main thread."""

    def fail():
        with contextlib.suppress(SystemExit):
            line.fail(why, 2, lambda: said.append(line.process), wait=wait)

    threading.Thread(target=fail).start()


def codes(ends, number):
    """The exit codes of the processes, once so many have ended."""
    found, seconds = {}, []
    start = time.monotonic()
    while len(found) < number:
        process, code, when = ends.get(timeout=20)
        found.setdefault(process, code)
        seconds.append(when - start)
    assert max(seconds) < 15
    return found


@pytest.mark.parametrize("failing", [0, 2])
def test_a_failure_ends_all(lifelines, capsys, failing):
    lines, ends = lifelines(3)
    said = []
    fail_in(lines[failing], "the disk is full", said)
    assert codes(ends, 3) == {0: 2, 1: 2, 2: 2}
    assert said == [failing]
    err = capsys.readouterr().err
    for line in lines:
        told = f"process {line.process} ends, too"
        assert err.count(told) == (line.process != failing)
    assert err.count(f"process {failing} of 3") == 2 and err.count("the disk is full") == 2


def test_the_same_failure_of_all_is_said_once(lifelines, capsys):
    lines, ends = lifelines(3)
    said = []
    for line in lines:
        line._own = "no such mesh"  # they are about to fail, too
    for line in lines:
        fail_in(line, "no such mesh", said)
    assert codes(ends, 3) == {0: 2, 1: 2, 2: 2}
    assert len(said) == 1
    assert capsys.readouterr().err == ""


def test_the_others_have_time_to_come_to_the_same_failure(lifelines, capsys):
    lines, ends = lifelines(3)
    said = []
    for line in lines:
        fail_in(line, "no such mesh", said, wait=0.5)
        time.sleep(0.05)
    assert codes(ends, 3) == {0: 2, 1: 2, 2: 2}
    assert len(said) == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("late", [0, 1])
def test_processes_that_fail_as_one_wait_for_each_other(lifelines, capsys, late):
    lines, ends = lifelines(3)
    said = []

    def fail(line):
        time.sleep(1.0 * (line.process == late))
        with contextlib.suppress(SystemExit):
            line.fail_as_one(2, lambda: said.append(line.process))

    in_threads(lines, fail)
    assert codes(ends, 3) == {0: 2, 1: 2, 2: 2}
    assert said == [0]
    assert capsys.readouterr().err == ""


def test_a_process_that_is_gone_ends_the_others_and_is_the_reason(lifelines, capsys):
    lines, ends = lifelines(3)
    said = []
    # What breaks in the others meanwhile waits for the reason.
    fail_in(lines[2], "a collective broke", said, wait=10.0)
    time.sleep(0.2)
    lines[1]._ended.add(0)  # a process that was killed says nothing
    lines[1]._hang_up()
    assert codes(ends, 2).keys() == {0, 2}
    err = capsys.readouterr().err
    assert err.count("process 1 of 3") >= 2 and "has ended without a word" in err
    assert said == [] and "a collective" not in err


@pytest.mark.parametrize("left", [0, 1])
def test_a_process_that_is_gone_is_told_once(lifelines, capsys, left):
    """Also where what breaks in the main thread is noticed just after."""
    lines, ends = lifelines(2)
    lines[1 - left]._ended.add(left)  # a process that was killed says nothing
    lines[1 - left]._hang_up()
    assert lines[left]._judged.wait(20)
    fail_in(lines[left], "a collective broke", [], wait=10.0)
    assert [ends.get(timeout=20)[:2] for _ in range(2)] == [(left, 2)] * 2
    err = capsys.readouterr().err
    assert err.count(f"process {1 - left} of 2") == 1 and "a collective" not in err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"coordinator": "a:1"}, "--coordinator a:1 without --distributed: add it"),
        ({"local_devices": (0, 1)}, "--local-devices 0 1 without --distributed"),
        (
            {"distributed": True, "processes": 2},
            "--processes 2 without --coordinator and --process: give all three, or none",
        ),
        (
            {"distributed": True, "coordinator": "a:1", "processes": 2, "process": 2},
            "--process 2 --processes 2: must lie between 0 and 1",
        ),
        (
            {"distributed": True, "coordinator": "a:1", "processes": 0, "process": 0},
            "--processes 0: must be at least 1",
        ),
        ({"distributed": True, "join_timeout": 0.0}, "--join-timeout 0: must be greater than 0"),
        ({"distributed": True, "local_devices": (-1,)}, "--local-devices -1: must not be negative"),
    ],
)
def test_flags_that_do_not_go_together(flags, words):
    with pytest.raises(UserError) as refused:
        JoinFlags(**flags).check_joining()
    assert words in str(refused.value)


def test_nothing_is_joined_without_being_asked():
    with distributed.joined(JoinFlags()):
        assert not distributed.several() and distributed.is_first()
        assert distributed.from_first("a", 5) == 5 and distributed.smallest("a", 5) == 5
        assert distributed.fake_devices(3) == 3


def test_no_cluster_is_told(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM", "OMPI", "KUBERNETES", "TPU", "CLOUD_TPU")):
            monkeypatch.delenv(name)
    with pytest.raises(UserError, match="neither by Slurm, Open MPI nor Kubernetes; give --coord"):
        distributed._where(JoinFlags(distributed=True))


def test_what_slurm_says(monkeypatch):
    said = {"JOB_ID": "70", "STEP_NODELIST": "n[3-5]", "NTASKS": "6", "PROCID": "4", "LOCALID": "1"}
    for name, value in said.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    address, processes, process, local = distributed._where(JoinFlags(distributed=True))
    assert address.startswith("n3:") and (processes, process, local) == (6, 4, [1])
    flags = JoinFlags(distributed=True, local_devices=(0, 1, 2))
    assert distributed._where(flags)[3] == [0, 1, 2]
    flags = JoinFlags(distributed=True, coordinator="a:9", processes=2, process=1)
    assert distributed._where(flags) == ("a:9", 2, 1, None)


class Talk:
    """A lifeline that says what it is told to."""

    def __init__(self, process, hosts, values=()):
        self.process, self.processes, self.hosts = process, len(hosts), hosts
        self.values = values

    def collect(self, name, value):
        return [value, *self.values]

    def from_first(self, name, value):
        return value


def test_values_that_differ_are_named(monkeypatch):
    monkeypatch.setattr(distributed, "_lifeline", Talk(0, ("a", "b"), [{"x": [1], "seed": 4}]))
    distributed.check_same("flags", {"x": (1,)}, "do")
    with pytest.raises(UserError, match="flags: seed is 3 in process 0 and 4 in process 1: do"):
        distributed.check_same("flags", {"x": (1,), "seed": 3}, "do")


def test_fake_devices_are_split_evenly(monkeypatch):
    monkeypatch.setattr(distributed, "_lifeline", Talk(1, ("a", "a", "b")))
    assert distributed.fake_devices(12) == 4
    assert distributed.fake_devices(8, asked=False) == 3
    with pytest.raises(UserError, match=r"--devices 8 over 3 processes: .* a multiple of 3"):
        distributed.fake_devices(8)


def test_flags_of_train_and_infer(tmp_path):
    import infer
    import train
    from moejax.serving.bench import BenchConfig

    given = ["--distributed", "--coordinator", "a:9", "--processes", "4", "--process", "3"]
    config, joining, _ = train.read_all_flags(
        ["--preset", "tiny", *given, "--local-devices", "0", "1"]
    )
    assert joining == JoinFlags(True, "a:9", 4, 3, (0, 1))
    # They are no part of a run.
    assert config == train.read_flags([])
    assert not {f.name for f in dataclasses.fields(config)} & set(vars(JoinFlags()))
    with pytest.raises(UserError, match="without --coordinator and --process"):
        train.read_flags(["--distributed", "--processes", "4"])
    with pytest.raises(UserError, match="without --distributed"):
        BenchConfig(process=1)
    for mode in ("chat", "serve", "routes"):
        assert infer.main([mode, *given]) == 2
