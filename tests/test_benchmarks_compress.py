"""The benchmark of fewer experts: its cases; and of a tiny model its rows, table and picture."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
sys.path.append(str(Path(__file__).parents[1] / "docs"))

import compress
import draw_compress
import figures_compress
from compress_model_support import save, weights_of


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("merge:48", {"method": "merge", "experts": 48, "by_layer": False}),
        ("merge:48@9", {"method": "merge", "experts": 48}),
        ("prune:32:by_layer=True", {"method": "prune", "experts": 32, "by_layer": True}),
    ],
)
def test_cases_are_flags(case, said):
    config = compress.config_of(case, compress.parse([]))
    assert {name: getattr(config, name) for name in said} == said


def test_flags_of_parts():
    args = compress.parse([])
    merged = compress.config_of("merge:48:merge.fit=each,merge.ridge=0.5", args)
    assert (merged.merge.fit, merged.merge.ridge) == ("each", 0.5)
    pruned = compress.config_of("prune:48:prune.saliency=frequency", args)
    assert pruned.prune.saliency == "frequency"
    shared = compress.config_of("share:0:sharing.kind=basis,sharing.rank=3", args)
    assert (shared.sharing.kind, shared.sharing.rank) == ("basis", 3)
    grouped = compress.config_of("group:4:group.by=alike", args)
    assert (grouped.method, grouped.experts) == ("group", 0)
    assert (grouped.group.size, grouped.group.by) == (4, "alike")
    assert figures_compress.name_of("group:4:group.by=alike") == (
        "side by side, 4 each, `group.by=alike`"
    )
    for case in compress.CASES:
        compress.config_of(case, args)


@pytest.mark.slow
def test_rows_of_a_tiny_model(rng, tmp_path, monkeypatch):
    save(tmp_path / "model", weights_of(rng))
    written = []
    monkeypatch.setattr(compress, "write_results", lambda name, rows, **more: written.append(rows))
    flags = "--cases merge:4 merge:4@3 prune:4 --tokens 960 --windows 8 --prompts 2 --length 48"
    flags += " --steps 2 --batch 2 --repeats 2 --jobs 2"
    compress.main(["--model", str(tmp_path / "model"), *flags.split()])
    rows = written[-1]
    assert [row["method"] for row in rows] == ["none", "merge:4", "merge:4@3", "prune:4"]
    merged, more = rows[1:3]
    assert more["active_parameters"] > merged["active_parameters"]
    assert more["compress_seconds"] == merged["compress_seconds"]  # done once
    assert more["bits_per_byte"] != merged["bits_per_byte"]
    assert rows[0]["delta_pct"] == 0 and rows[0]["finetuned_delta_pct"] == 0
    for row in rows:
        assert np.isfinite([row["bits_per_byte"], row["finetuned_bits_per_byte"]]).all()
        first, second = row["finetuned_bits_per_byte_each"]
        assert first != second and row["finetuned_bits_per_byte"] == (first + second) / 2
        assert row["finetuned_bits_per_byte"] != row["bits_per_byte"]
    # A router of a merged model is larger than that of a pruned one, its experts are as many.
    assert rows[3]["parameters"] < rows[1]["parameters"] < rows[0]["parameters"]
    headings, body = figures_compress.compress({"rows": rows})
    assert len(body) == 4 and all(len(line) == len(headings) for line in body)
    draw_compress.draw(rows).savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000
