"""Two hundred clients at once, a fifth of which go away."""

import pytest
from serve_support import book_loop, book_model

pytest.importorskip("uvicorn")

from moejax.serving.start import running_model
from moejax.serving.stress import StressConfig, stress


def check(config, findings):
    assert not findings.wrong, findings.wrong[:5]
    assert {"equal", "streamed", "left"} <= findings.counts.keys()
    assert sum(findings.counts.values()) > config.clients


@pytest.mark.slow
def test_the_packaged_model():
    """For two minutes: python -m moejax.serving.stress --seconds 120."""
    config = StressConfig(seconds=20, max_len=64, page_len=4, prefill_chunk=64)
    with running_model(config, warm_up=True) as (model, loop):
        findings = stress(config, model, loop)
    check(config, findings)
    assert loop.stats.reused_tokens > 0 and findings.counts["refused"] > 0


def test_made_up_devices(monkeypatch):
    """The same at the speed of the server alone, with pages that texts must give back."""
    config = StressConfig(seconds=3, clients=60, leaving=0.3, prompts=12, max_tokens=40)
    loop = book_loop(monkeypatch, 0.002, max_rows=8, max_waiting=16, pages=24).start()
    findings = stress(config, book_model(), loop)
    check(config, findings)
    assert findings.counts["refused"] > 0 and loop.stats.preemptions > 0
