"""Tuning tables: what is stored and how, and what is refused."""

import copy
import json
import os
import re
import stat
from dataclasses import asdict

import pytest
from tuning_support import MEASURED, PRODUCT, ask, random_products, table_of

from pallas_kernels.tuning import Cut, Table, TableError, use_table
from pallas_kernels.tuning.lookup import TABLES, device_kind, package_table
from pallas_kernels.tuning.product import candidates
from pallas_kernels.tuning.table import device_slug, read_table, store_table


def test_tables_round_trip(rng, tmp_path):
    heuristic = Cut(64, 2, 1)
    cuts = {p: candidates(p, heuristic, 100)[-1] for p in random_products(rng, 20)}
    path = tmp_path / "folder" / "table.json"
    store_table(table_of(cuts), path)
    assert read_table(path, device_kind()) == table_of(cuts)
    first = path.read_text()
    store_table(table_of(dict(reversed(cuts.items()))), path)
    assert path.read_text() == first  # whatever the order
    assert list(path.parent.iterdir()) == [path]
    with use_table(path):
        for product, cut in cuts.items():
            assert ask(product) == cut
            # any number of rows of the same power of two
            rows = int(rng.integers(product.assignments, 2 * product.assignments))
            assert ask(product, assignments=rows) == cut


def test_a_failed_write_leaves_the_table(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    store_table(table_of({PRODUCT: Cut(128, 6, 4)}), path)
    before = path.read_text()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        store_table(table_of({PRODUCT: Cut(256, 4, 8)}), path)
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]


def test_permissions_and_links_stay(tmp_path):
    table = table_of({PRODUCT: Cut(128, 6, 4)})
    before = os.umask(0o027)
    try:
        store_table(table, tmp_path / "new.json")
    finally:
        os.umask(before)
    path, link = tmp_path / "there.json", tmp_path / "link.json"
    store_table(Table(device_kind(), {}), path)
    path.chmod(0o604)
    link.symlink_to(path.name)
    store_table(table, link)
    assert link.is_symlink() and read_table(path) == table
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new.json", "there.json")]
    assert modes == [0o640, 0o604] and len(list(tmp_path.iterdir())) == 3


def test_no_impossible_cut_is_stored(tmp_path):
    with pytest.raises(ValueError, match="bytes of shared memory"):
        store_table(table_of({PRODUCT: Cut(256, 5, 4)}), tmp_path / "table.json")
    assert not list(tmp_path.iterdir())


def test_the_librarys_tables():
    paths = list(TABLES.glob("*.json"))
    assert paths
    for path in paths:
        table = read_table(path)
        assert path == package_table(table.device)
    assert device_slug("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3"


def valid():
    entry = {
        "product": asdict(PRODUCT),
        "cut": asdict(Cut(256, 4, 8)),
        "measured": asdict(MEASURED),
    }
    return json.loads(json.dumps({"format": 1, "device": device_kind(), "entries": [entry] * 1}))


def broken(*path_and_value):
    *path, last, value = path_and_value
    content = found = valid()
    for step in path:
        found = found[step]
    if value is KeyError:
        del found[last]
    else:
        found[last] = value
    return json.dumps(content)


CUT, KEY, NUMBERS = (("entries", 0, name) for name in ("cut", "product", "measured"))
HOSTILE = {
    "tile does not divide": (broken(*KEY, "columns", 14400), "tiles of 128 do not divide 14400"),
    "no multiple": (broken(*CUT, "tile_n", 250), "tile_n=250 is not 2 times a multiple of 64"),
    "too wide": (broken(*CUT, "tile_n", 512), "tile_n=512 is more than the 256 columns"),
    "shared memory": (broken(*CUT, "stages", 5), "245760 bytes of shared memory, and 196608"),
    "one stage": (broken(*CUT, "stages", 1), "stages=1: a stage is released a step late"),
    "unknown field": (broken(*CUT, "tile_k", 128), "cut has an unknown field 'tile_k'"),
    "missing field": (broken(*CUT, "band", KeyError), "cut has no field 'band'"),
    "float": (broken(*CUT, "band", 4.0), "band is 4.0, not a positive integer"),
    "bool": (broken(*CUT, "band", True), "band is True, not a positive integer"),
    "negative": (broken(*CUT, "band", -4), "band is -4, not a positive integer"),
    "huge": (broken(*CUT, "band", 10**30), "not a positive integer"),
    "text": (broken(*CUT, "tile_n", "256\n"), r"tile_n is '256\n', not a positive integer"),
    "cut is a list": (broken(*CUT[:-1], "cut", [256, 4, 4]), "cut is [256, 4, 4], not an object"),
    "no product": (broken(*KEY[:-1], "product", KeyError), "it has no field 'product'"),
    "bucket": (broken(*KEY, "assignments", 1000), "assignments are 1000, no power of two"),
    "flags": (broken(*KEY, "flags", ["keep", "gather"]), "not sorted or not distinct"),
    "flags are text": (broken(*KEY, "flags", "keep"), "flags are 'keep', not a list of names"),
    "a flag is a number": (broken(*KEY, "flags", [1]), "flags are [1], not a list of names"),
    "misspelt flag": (broken(*KEY, "flags", ["keeps"]), "flag 'keeps' is none of few, gather"),
    "misspelt kernel": (broken(*KEY, "kernel", "expert_up"), "kernel 'expert_up' is none of"),
    "misspelt dtype": (broken(*KEY, "dtype", "bf16"), "dtype 'bf16' is none of bfloat16"),
    "deeper stage": (broken(*KEY, "tile_k", 128), "393216 bytes of shared memory, and 196608"),
    "NaN": (broken(*NUMBERS, "ms", float("nan")), "ms is nan, not a positive number"),
    "infinite": (broken(*NUMBERS, "ms", float("inf")), "ms is inf, not a positive number"),
    "twice": (broken("entries", valid()["entries"] * 2), "entry 1: its product has an entry"),
}
HOSTILE_FILES = {
    "newer": (broken("format", 2), "format 2 is newer than 1, the newest that this version reads"),
    "format": (broken("format", "1"), "format is '1', not a positive integer"),
    "other device": (broken("device", "NVIDIA H200"), "a table for 'NVIDIA H200'"),
    "entries": (broken("entries", {}), "'device' must be a name and 'entries' a list"),
    "unknown": (broken("version", 3), "the table has an unknown field 'version'"),
    "no object": ("[1]", "a JSON object with 'format' is expected"),
    "cut short": (broken("format", 1)[:-9], ""),
    "no JSON": ("tile_n = 256", "Expecting value"),
    "empty": ("", "Expecting value"),
    "field twice": ('{"format": 1, "format": 1}', "a field twice"),
    "nested": ("[" * 100_000, "nested"),
    "digits": ('{"format": ' + "9" * 5000 + "}", ""),
    "no text": (b"\xff\xfe\x00", "can't decode"),
}


@pytest.mark.parametrize("case", [*HOSTILE, *HOSTILE_FILES])
def test_hostile_tables_are_refused_in_one_line(case, tmp_path):
    content, reason = (HOSTILE | HOSTILE_FILES)[case]
    path = tmp_path / "table.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TableError) as caught, use_table(path):
        pass
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 500
    assert reason in message
    assert case not in HOSTILE or re.search(r"entry \d: ", message)


def test_valid_means_valid(tmp_path):
    """The tables above are broken by what they change alone."""
    path = tmp_path / "table.json"
    path.write_text(json.dumps(valid()))
    assert read_table(path).entries[PRODUCT].cut == Cut(256, 4, 8)
    assert json.loads(broken(*CUT, "band", 8)) == valid() == copy.deepcopy(valid())


def test_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(TableError, match=re.escape(f"{path}: ")), use_table(path):
            pass


def test_a_broken_table_of_the_library_is_no_silent_heuristic(tmp_path, monkeypatch):
    monkeypatch.setattr("pallas_kernels.tuning.lookup.TABLES", tmp_path)
    monkeypatch.setattr("pallas_kernels.tuning.lookup.device_kind", lambda: "made up")
    (tmp_path / "made_up.json").write_text('{"format": 7}')
    with pytest.raises(TableError, match="format 7 is newer"):
        ask(PRODUCT)
    (tmp_path / "other.json").write_text('{"format": 7}')
    monkeypatch.setattr("pallas_kernels.tuning.lookup.device_kind", lambda: "Other one")
    assert ask(PRODUCT) == Cut(256, 4, 4)
