"""The near-duplicate check, on edits of real files of the standard library."""

import difflib
import importlib.util
import re
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax import data
from moejax.data import Document, NearDuplicates
from moejax.data.dedup import _SHORTEST_LINE

HELD_OUT = ["argparse.py", "json/decoder.py", "sched.py", "textwrap.py", "heapq.py", "cmd.py"]

LICENCE = """# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
"""
IMPORTS = """from __future__ import annotations
import os
import sys
import json
import collections.abc
from typing import (
    Any,
    Callable,
    Iterable,
    Sequence,
)
from dataclasses import dataclass, field
"""


@pytest.fixture(scope="module")
def library():
    return {d.path: d for d in data.load_standard_library().documents}


@pytest.fixture(scope="module")
def index(library):
    return NearDuplicates([library[path] for path in HELD_OUT])


def reindent(text):
    return re.sub(r"(?m)^( +)", lambda m: "\t" * (len(m[1]) // 2), text).replace("\n", "\r\n")


def recomment(text):
    text = re.sub(r"(?m)#.*$", "# another comment", text)
    return "# vendored\n\n" + text.replace("\n\n", "\n\n\n# more\n\n")


def rename_header(text):
    body = text.split("\n", 40)[-1]
    return f'"""A fine module by somebody else."""\n\nimport os, sys\n__author__ = "me"\n{body}'


def requote(text):
    return text.replace("'", '"')


@pytest.mark.parametrize("edit", [str, reindent, recomment, rename_header, requote])
@pytest.mark.parametrize("path", HELD_OUT)
def test_edited_copies_are_found(library, index, path, edit):
    match = index.match(edit(library[path].text))
    assert match.is_copy and match.path == path
    assert match.overlap > 0.8 and match.coverage > 0.6
    if edit in (str, reindent, requote):
        assert match.exact and match.overlap == match.coverage == 1


@pytest.mark.parametrize("path", HELD_OUT)
def test_an_older_version_is_found(library, index, path, rng):
    """30 % of the lines differ, one by one, which is worse than the blocks of real changes."""
    lines = library[path].text.split("\n")
    for i in np.flatnonzero(rng.random(len(lines)) < 0.3):
        lines[i] = f"{lines[i][: len(lines[i]) // 2]}_old_{i}" if i % 3 else ""
    match = index.match("\n".join(lines))
    assert match.is_copy and match.path == path


@pytest.mark.parametrize("path", HELD_OUT)
def test_containment_both_ways(library, index, path):
    text = library[path].text
    others = "".join(library[p].text for p in ("ast.py", "inspect.py", "tarfile.py"))
    inside = index.match(others + text + others)
    assert inside.is_copy and inside.path == path and inside.coverage > 0.8
    assert inside.overlap < inside.coverage
    lines = text.split("\n")
    part = index.match("\n".join(lines[len(lines) // 2 : len(lines) // 2 + 60]))
    assert part.is_copy and part.path == path and part.overlap > 0.9


def test_unrelated_files_are_not(library, index):
    """Other modules of the same library, by the same authors, in the same style."""
    names = ["ast.py", "inspect.py", "tarfile.py", "statistics.py", "zipfile.py", "csv.py"]
    names = [n for n in [*names, "getopt.py", "optparse.py", "shlex.py"] if n in library]
    kept, excluded = index.filter([library[n] for n in names])
    assert [d.path for d in kept] == names and excluded == []


@pytest.mark.parametrize("header", [LICENCE, IMPORTS, LICENCE + IMPORTS])
@pytest.mark.parametrize("as_docstring", [False, True])
def test_shared_headers_are_not_copies(header, as_docstring):
    if as_docstring:
        header = '"""' + LICENCE.replace("# ", "") + '"""\n' + header
    body = "".join(f"def held_{i}(a, b):\n    return a * {i} + b\n" for i in range(4))
    other = "".join(f"class Other{i}:\n    value = {i} + 7\n" for i in range(4))
    near = NearDuplicates([Document("h.py", header + body), Document("bare.py", header)])
    assert near.is_copy(header + body)
    assert not near.is_copy(header + other)
    assert near.overlap(header + other) == 0


def test_filter_reports(library, index):
    docs = [
        library["ast.py"],
        Document("vendor/argparse.py", recomment(library["argparse.py"].text)),
        Document("empty.py", ""),
        Document("comments.py", "# nothing\n\n"),
    ]
    kept, excluded = index.filter(docs)
    assert [d.path for d in kept] == ["ast.py", "empty.py", "comments.py"]
    assert [(e.path, e.match.path) for e in excluded] == [("vendor/argparse.py", "argparse.py")]


def test_tiny_documents():
    near = NearDuplicates(
        [Document("a", "x = compute(1)\n"), Document("b", "\n"), Document("c", "")]
    )
    assert near.is_copy("x  =  compute(1)  # again") and not near.is_copy("y = compute(1)\n")
    assert not near.is_copy("") and not near.is_copy("\n\n# b\n")
    assert not NearDuplicates([]).is_copy("x = compute(1)\n")


WORDS = st.sampled_from(
    ["alpha = 1", "beta()", "gamma[2]", "return delta", "for e in eta:", "pass", "", "   ", "zz"]
)
TEXT = st.lists(WORDS, max_size=14)


def brute_force(lines, n):
    """The set of runs of n lines, as tuples of strings."""
    lines = [re.sub(r"\s", "", line) for line in lines]
    lines = [line for line in lines if len(line) >= _SHORTEST_LINE]
    n = min(n, len(lines))
    return {tuple(lines[i : i + n]) for i in range(len(lines) - n + 1)} - {()}


@given(st.lists(TEXT, max_size=4), TEXT, st.integers(1, 4))
@settings(deadline=None, max_examples=200)
def test_against_sets_of_strings(held_out, text, n):
    near = NearDuplicates([Document(str(i), "\n".join(t)) for i, t in enumerate(held_out)], n=n)
    match = near.match("\n".join(text))
    grams = brute_force(text, n)
    sets = [brute_force(t, n) for t in held_out]
    hits = sum(any(g in s for s in sets) for g in grams)
    assert match.overlap == pytest.approx(hits / len(grams) if grams else 0)
    best = max((len(grams & s) / len(s) for s in sets if s), default=0)
    if not match.exact:
        assert match.coverage == pytest.approx(best)
    assert match.exact == any(
        "".join("".join(text).split()) != ""
        and [w for w in re.sub(r"[^\S\n]", "", "\n".join(text)).split()]
        == [w for w in re.sub(r"[^\S\n]", "", "\n".join(t)).split()]
        for t in held_out
    )


@given(st.data())
@settings(deadline=None, max_examples=40)
def test_layout_never_matters(data_strategy):
    lines = data_strategy.draw(st.lists(WORDS, min_size=1, max_size=20))
    draw = data_strategy.draw
    changed = []
    for line in lines:
        changed.append(draw(st.sampled_from(["", "  ", "\t\t"])) + line.replace(" ", "  "))
        changed[-1] += draw(st.sampled_from(["", "  # why", "\r", "#"]))
        changed += draw(st.sampled_from([[], [""], ["# note", "\t"]]))
    near = NearDuplicates([Document("h", "\n".join(lines))])
    match = near.match("\n".join(changed))
    assert match.exact == bool("".join(lines).strip()) == match.is_copy


@pytest.mark.parametrize("length", [10, 60])
def test_cost_is_linear(index, length):
    """Texts made to be slow for patterns that backtrack; each took under 1 s."""
    hard = [
        "from x import (\n" * 50_000,
        '"""' + 'a"' * 300_000,
        "import " * 100_000 + "=",
        '"""\\' * 100_000,
        "word " * length * 20_000,
    ]
    start = time.monotonic()
    for text in hard:
        index.match(text)
    assert time.monotonic() - start < 30


def test_fast_enough(library, index):
    """300 MB in 3 minutes are 1.7 MB/s; about 40 were measured."""
    docs = list(library.values())
    start = time.monotonic()
    _, excluded = index.filter(docs)
    seconds = time.monotonic() - start
    assert sum(d.num_bytes for d in docs) / seconds > 1.7e6
    assert set(HELD_OUT) <= {e.path for e in excluded}
    # The library holds a few near copies of its own, but only a few.
    assert len(excluded) < len(HELD_OUT) + 10


def share_of_lines(a, b):
    """The lines that two texts have in common, in order, over their mean number of lines."""
    a, b = a.splitlines(), b.splitlines()
    blocks = difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
    return 2 * sum(block.size for block in blocks) / (len(a) + len(b))


def test_vendored_distutils(library):
    """setuptools carries a copy of distutils that went its own way years ago."""
    spec = importlib.util.find_spec("setuptools")
    folder = Path(spec.origin).parent / "_distutils" if spec and spec.origin else None
    old = {
        p.removeprefix("distutils/"): d for p, d in library.items() if p.startswith("distutils/")
    }
    if not old or folder is None or not folder.is_dir():
        pytest.skip("needs a Python with distutils and setuptools with its copy of it")
    vendored = {d.path: d for d in data.load_corpus([str(folder)]).documents}
    # Below that there is hardly a statement to compare; and some files were written anew.
    both = [n for n in old if n in vendored and min(old[n].num_bytes, vendored[n].num_bytes) > 999]
    both = [n for n in both if share_of_lines(old[n].text, vendored[n].text) > 0.3]
    assert len(both) > 20
    near = NearDuplicates([old[name] for name in both])
    _, excluded = near.filter([vendored[name] for name in both])
    missed = set(both) - {e.path for e in excluded}
    assert not missed
