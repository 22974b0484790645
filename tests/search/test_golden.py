"""The pinned search: a change of any number here is a change of the algorithm, or of numpy's random streams."""

import json
import runpy
from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "golden"


def test_the_search_follows_its_golden_trace():
    expected = json.loads((GOLDEN / "search_trace.json").read_text(encoding="utf-8"))
    trace = runpy.run_path(str(GOLDEN / "rewrite.py"))["search_trace"]()
    assert len(trace) == len(expected)
    for record, pinned in zip(trace, expected, strict=True):
        assert record == pinned, f"generation {pinned['generation']} changed (rewrite: python tests/golden/rewrite.py)"
