"""Zero-shot tasks of made-up questions."""

import json

import numpy as np
import pytest
import yaml

WORDS = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen", "ibis", "jay", "kite", "lark", "mole", "newt", "owl", "pig", "rat"]


@pytest.fixture(scope="module", autouse=True)
def datasets_cache(tmp_path_factory):
    """Keep made-up questions out of the user's cache."""
    datasets = pytest.importorskip("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def write_task():
    """Write a local task: its lines as JSON, and lm-eval's file that names them."""

    def write(folder, name, rows, **config):
        (folder / "tasks").mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
            "output_type": "multiple_choice",
            "test_split": "test",
            "doc_to_text": "{{question}}",
            "doc_to_target": "gold",
            "doc_to_choice": "{{options}}",
            "num_fewshot": 0,
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(task | config))

    return write


@pytest.fixture(scope="module")
def tasks_path(tmp_path_factory, write_task):
    """Two tasks: answers after a question, and, as WinoGrande has it, one end after two beginnings."""
    folder, rng = tmp_path_factory.mktemp("tasks"), np.random.default_rng(0)
    rows = [
        {"question": f"Which of {rng.integers(100)}?", "options": [str(word) for word in rng.choice(WORDS, 4)], "gold": i % 4}
        for i in range(24)
    ]
    write_task(folder, "animals_local", rows, doc_to_text="Question: {{question}}\nAnswer:")
    rows = [
        {"label": i % 2, "contexts": [f"The {a}", f"The {b}"], "end": f"ate the {c}."}
        for i, (a, b, c) in enumerate(rng.choice(WORDS, (17, 3)))
    ]
    write_task(folder, "ends", rows, doc_to_text="label", doc_to_target="end", doc_to_choice="contexts")
    return folder
