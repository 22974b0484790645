"""No key or token of the environment gets into what a run leaves behind, and every JSON file of ours there says its version."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import evopress.__main__ as program

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_planted1planted1planted1planted1",
    "HUGGING_FACE_HUB_TOKEN": "hf_planted2planted2planted2planted2",
    "AWS_SECRET_ACCESS_KEY": "planted3/planted3+planted3planted3",
    "OPENAI_API_KEY": "sk-planted4planted4",
    "GIT_ASKPASS_PASSWORD": "planted5planted5",
}
NETRC = "planted6planted6planted6planted6planted6"
FOREIGN = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
"""Files of transformers in a checkpoint."""


def files_below(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("tracker", ["none", "wandb"])
def test_no_secret_is_written(tracker: str, tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if tracker == "wandb":
        pytest.importorskip("wandb")
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {NETRC}\n", encoding="utf-8")
    main = program.main

    def with_secrets() -> None:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**SECRETS, "NETRC": str(tmp_path / "netrc")}.items():
                patch.setenv(name, value)
            main()

    monkeypatch.setattr(program, "main", with_secrets)
    arguments = ["tracker=wandb", "tracker.mode=offline"] if tracker == "wandb" else []
    outcome = tiny(f"level_db.root={tmp_path / 'levels'}", *arguments)
    assert outcome.code == 0, outcome.text
    assert (tmp_path / "run" / "checkpoint" / "evopress.json").is_file() and (tmp_path / "run" / "report.html").is_file()
    planted = {**SECRETS, "netrc": NETRC}
    for name, value in planted.items():
        assert value not in outcome.text, f"{name} was printed"
    searched = files_below(tmp_path / "run", tmp_path / "levels")
    assert len(searched) > 30
    for path in searched:
        content = path.read_bytes()
        for name, value in planted.items():
            assert value.encode() not in content, f"{path} holds {name}"
        for variable in ("AWS_SECRET", "OPENAI_API", "GIT_ASKPASS"):  # no dump of the environment either
            assert variable.encode() not in content, f"{path} names {variable}"
    assert os.environ.get("OPENAI_API_KEY") != SECRETS["OPENAI_API_KEY"]


def test_every_json_file_of_ours_says_its_version(finished: Any) -> None:
    result = json.loads((finished.folder / "result.json").read_text(encoding="utf-8"))
    ours = [
        path
        for path in files_below(finished.folder, Path(result["database"]["path"]))
        if path.suffix in (".json", ".jsonl") and not (path.parent.name == "checkpoint" and path.name in FOREIGN)
    ]
    assert {"genome.json", "result.json", "state.json", "metrics.jsonl", "finished.json", "baselines.json", "environment.json"} <= {
        path.name for path in ours
    }
    assert {"evopress.json", "manifest.json"} <= {path.name for path in ours}
    for path in ours:
        for line in (
            path.read_text(encoding="utf-8").splitlines() if path.suffix == ".jsonl" else [path.read_text(encoding="utf-8")]
        ):
            assert type(json.loads(line).get("schema")) is int, f"{path} has no schema number"
