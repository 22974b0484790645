"""The picture of dropped modules has what was dropped in it."""

from __future__ import annotations

from pathlib import Path

from evopress.reporting.dropped import dropped_modules_figure


def test_the_picture_depends_on_every_module_and_on_nothing_else(tmp_path: Path) -> None:
    seen = set()
    for dropped in (set(), {(0, "attention")}, {(0, "mlp")}, {(3, "attention")}, {(3, "attention"), (0, "mlp")}):
        paths = dropped_modules_figure({"A1: perplexity 1.22e+07": {(1, "mlp")}, "evopress": dropped}, 4, tmp_path)
        again = dropped_modules_figure({"A1: perplexity 1.22e+07": {(1, "mlp")}, "evopress": set(dropped)}, 4, tmp_path / "again")
        assert [path.name for path in paths] == ["dropped_modules.png", "dropped_modules.svg"]
        assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]
        seen.add(paths[1].read_bytes())
    assert len(seen) == 5
    assert "A1: perplexity 1.22e+07" in paths[1].read_text(encoding="utf-8")
