import dataclasses
import json
import logging
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tokenizers.processors import TemplateProcessing

from evopress.errors import EvoPressError
from evopress.evaluation import zero_shot
from evopress.evaluation.zero_shot import PAPER_TASKS, TaskScore, ZeroShot, check_tasks, load_tasks, measure_zero_shot
from evopress.export import export_checkpoint
from evopress.levels.live import LiveModel
from evopress.levels.modules import ModuleLevels
from evopress.methods.drop import Drop
from evopress.models import attention
from evopress.models.tiny import byte_tokenizer
from evopress.settings import DropSettings

pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval[hf] is not installed")

SHARED = Path(__file__).parents[3] / "shared" / "data" / "zeroshot"
ACC = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
ASKED = {"doc_to_text": "{{question}}", "doc_to_target": "gold", "doc_to_choice": "{{options}}"}
WORDS = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen", "ibis", "jay", "kite", "lark", "mole", "newt", "owl", "pig", "rat"]


@pytest.fixture(scope="module", autouse=True)
def datasets_cache(tmp_path_factory):
    """Keep made-up questions out of the user's cache."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


def write_task(folder, name, rows, **config):
    """Write a local task: its lines as JSON, and lm-eval's file that names them."""
    (folder / "tasks").mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "num_fewshot": 0,
        "metric_list": ACC,
    }
    (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(task | config))


@pytest.fixture(scope="module")
def tasks_path(tmp_path_factory):
    """Two tasks: answers after a question, and, as WinoGrande has it, one end after two beginnings."""
    folder, rng = tmp_path_factory.mktemp("tasks"), np.random.default_rng(0)
    rows = [
        {"question": f"Which of {rng.integers(100)}?", "options": [str(word) for word in rng.choice(WORDS, 4)], "gold": i % 4}
        for i in range(24)
    ]
    write_task(folder, "animals_local", rows, **ASKED | {"doc_to_text": "Question: {{question}}\nAnswer:"})
    rows = [
        {"label": i % 2, "contexts": [f"The {a}", f"The {b}"], "end": f"ate the {c}."}
        for i, (a, b, c) in enumerate(rng.choice(WORDS, (17, 3)))
    ]
    write_task(folder, "ends", rows, doc_to_text="label", doc_to_target="end", doc_to_choice="contexts")
    return folder


def genomes_of(live):
    n = len(live.space)
    return {"dense": None, "two": (2,) * n, "mixed": tuple(i * 7 % 3 for i in range(n))}


def measure(live, tasks, **settings):
    return measure_zero_shot(live, byte_tokenizer(), genomes_of(live), tasks, **settings)


# The numbers


def lm_eval_on(folder, tasks_path, monkeypatch):
    """Evaluate a checkpoint as `lm_eval --model hf --include_path tasks --tasks animals_local,ends --batch_size 4` does."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    with monkeypatch.context() as patch:
        patch.chdir(tasks_path)
        return lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(folder)},
            tasks=["animals_local", "ends"],
            task_manager=TaskManager(include_path="tasks", include_defaults=False),
            device="cpu",
            batch_size=4,
            bootstrap_iters=10,
        )


def compare_with_lm_eval(live, genomes, tasks_path, folder, monkeypatch):
    tasks = load_tasks(["animals", "ends"], tasks_path=str(tasks_path))
    mine = measure_zero_shot(live, byte_tokenizer(), genomes, tasks, batch_size=4)
    for name, genome in genomes.items():
        model, tokenizer = live.blocks.model, byte_tokenizer()
        if genome is None:
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
        else:
            files = {"genome_files": (), "provenance": {}}
            export_checkpoint(folder / name, live=live, model=model, tokenizer=tokenizer, genome=genome, **files)
        theirs = lm_eval_on(folder / name, tasks_path, monkeypatch)
        for task, score in mine[name].tasks.items():
            own_name = {"animals": "animals_local"}.get(task, task)
            result = theirs["results"][own_name]
            assert score.accuracy == pytest.approx(result["acc,none"], abs=1e-12)
            assert score.stderr == pytest.approx(result["acc_stderr,none"], abs=1e-12)
            assert score.correct == tuple(bool(sample["acc"]) for sample in theirs["samples"][own_name])
    assert len({score.tasks["animals"].correct for score in mine.values()}) > 1, "all genomes answer alike: nothing was compared"


@pytest.mark.parametrize(("family", "dtype"), [("llama", "float32"), ("llama", "bfloat16"), ("gemma2", "float32")])
def test_numbers_are_those_of_lm_eval_on_the_exported_checkpoint(family, dtype, live_model, tasks_path, tmp_path, monkeypatch):
    live = live_model(family, num_blocks=2, dtype=dtype)
    compare_with_lm_eval(live, genomes_of(live), tasks_path, tmp_path, monkeypatch)


BOS = "Ā"  # the letter of byte 0, which no text has


def tokenizer_with_bos(*, added):
    """Return the byte tokenizer with a beginning of text, which it puts before a text or only knows."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": BOS})
    if added:
        ids = [(BOS, tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=ids)
    return tokenizer


def prompts_of(live, tokenizer, tasks, monkeypatch, **settings):
    """Return what the model was asked, a row of ids for each forward's first sequence."""
    asked, forward = [], live.blocks.model.forward
    monkeypatch.setattr(live.blocks.model, "forward", lambda ids, **rest: asked.append(ids[0].tolist()) or forward(ids, **rest))
    measure_zero_shot(live, tokenizer, {"dense": None}, tasks, limit=3, batch_size=1, **settings)
    return asked


@pytest.mark.parametrize(
    ("added", "bos", "begins"), [(True, "auto", 1), (True, "false", 0), (False, "auto", 0), (False, "true", 1)]
)
def test_prompts_begin_as_the_text_does(added, bos, begins, live_model, tasks_path, monkeypatch):
    tokenizer, tasks = tokenizer_with_bos(added=added), load_tasks(["animals", "ends"], tasks_path=str(tasks_path))
    asked = prompts_of(live_model("llama", num_blocks=2), tokenizer, tasks, monkeypatch, bos=bos)
    assert asked and all(ids.count(tokenizer.bos_token_id) == begins for ids in asked)
    assert all((ids[0] == tokenizer.bos_token_id) == bool(begins) for ids in asked)


def test_a_bos_that_the_tokenizer_adds_is_lm_evals(live_model, tasks_path, tmp_path, monkeypatch):
    tokenizer = tokenizer_with_bos(added=True)
    monkeypatch.setitem(globals(), "byte_tokenizer", lambda: tokenizer)
    live = live_model("llama", num_blocks=2)
    compare_with_lm_eval(live, genomes_of(live), tasks_path, tmp_path, monkeypatch)


def test_a_question_with_a_token_beyond_the_embedding_is_refused(tasks_path):
    tokenizer, tasks = byte_tokenizer(), load_tasks(["animals", "ends"], tasks_path=str(tasks_path))
    zero_shot.check_questions(tasks, tokenizer, num_rows=257)
    tokenizer.add_tokens(["nowhere"])
    zero_shot.check_questions(tasks, tokenizer, num_rows=257)
    tokenizer.add_tokens(["Question"])
    with pytest.raises(
        EvoPressError, match=r"questions of task 'animals' have the token 'Question' \(id 258\).* leave the task out"
    ):
        zero_shot.check_questions(tasks, tokenizer, num_rows=257)


def test_so_they_are_where_modules_are_dropped(tiny_blocks, tasks_path, tmp_path, monkeypatch):
    blocks = tiny_blocks(num_blocks=3)
    method = Drop(DropSettings(), sparsity=0.5, exchange="name")
    live = LiveModel(blocks, ModuleLevels(method.space(blocks.shapes(), dtype_bits=32)))
    genomes = {"dense": None, "first attention": (1, 0, 0, 0, 0, 0), "a whole block": (0, 1, 1, 1, 0, 0)}
    compare_with_lm_eval(live, genomes, tasks_path, tmp_path, monkeypatch)


def test_limit_takes_the_first_questions(live_model, tasks_path):
    tasks = load_tasks(["animals", "ends"], tasks_path=str(tasks_path))
    whole, part = (measure(live_model(), tasks, limit=limit) for limit in (None, 5))
    for name in whole:
        for task, score in part[name].tasks.items():
            assert score.correct == whole[name].tasks[task].correct[:5]
    assert [score.num_questions for score in whole["dense"].tasks.values()] == [24, 17]


def test_a_model_that_streams_its_blocks_answers_alike(live_model, tasks_path, monkeypatch):
    live = live_model("gemma2")
    tasks = load_tasks(["animals", "ends"], tasks_path=str(tasks_path))
    expected = measure(live, tasks)
    monkeypatch.setattr(live.blocks, "offload", True)
    monkeypatch.setattr(live.blocks.model, "forward", None)  # the whole model cannot be called
    carried, on_device, last = [], live.blocks.on_device, len(live.blocks.blocks) - 1
    monkeypatch.setattr(live.blocks, "on_device", lambda index, **how: carried.append(index) or on_device(index, **how))
    assert measure(live, tasks) == expected
    assert carried.count(last) == len(expected)  # once for all questions, not for each batch
    carried.clear()
    monkeypatch.setattr(zero_shot, "MOST_ON_HOST", 1)
    measure(live, tasks, limit=3)
    assert carried.count(last) > len(expected)


# What it leaves alone


def test_the_model_is_the_dense_one_again_and_no_generator_is_touched(
    live_model, tiny_blocks, tasks_path, weights_digest, capfd, caplog
):
    caplog.set_level(logging.INFO)
    live = live_model()
    live = LiveModel(tiny_blocks(num_blocks=4), live.levels)
    model, tokenizer = live.blocks.model, byte_tokenizer()
    assert model.config._attn_implementation == attention.NAME
    before = weights_digest(model), tokenizer.pad_token, model.config._attn_implementation
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    levels = {name: logging.getLogger(name).level for name in ("lm_eval", "datasets", "huggingface_hub")}
    cwd = Path.cwd()
    tasks = load_tasks(["animals", "ends"], tasks_path=str(tasks_path))
    measure_zero_shot(live, tokenizer, genomes_of(live), tasks)
    assert (weights_digest(model), tokenizer.pad_token, model.config._attn_implementation) == before
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert {name: logging.getLogger(name).level for name in levels} == levels
    assert Path.cwd() == cwd
    assert capfd.readouterr() == ("", "")
    assert [record.getMessage() for record in caplog.records] == ["zero-shot: 3 models on 41 questions of animals, ends"]


def test_draws_of_a_task_do_not_reach_the_generators(tmp_path, live_model):
    """Some tasks shuffle their questions with the global generators."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "shuffling.py").write_text(
        "import random\nimport numpy as np\nimport torch\n\n"
        "def docs(dataset):\n    random.seed(1), np.random.seed(1), torch.manual_seed(1)\n    return dataset\n"
    )
    rows = [{"question": "Who?", "options": ["ant", "bee"], "gold": 0}, {"question": "What?", "options": ["owl", "rat"], "gold": 1}]
    write_task(tmp_path, "shuffled", rows, **ASKED)
    path = tmp_path / "tasks" / "shuffled.yaml"
    path.write_text(path.read_text() + "process_docs: !function shuffling.docs\n")
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    measure(live_model(), load_tasks(["shuffled"], tasks_path=str(tmp_path)))
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states


def test_examples_before_the_question_are_the_same_for_all_genomes(tmp_path, live_model):
    rows = [{"question": f"Say {word}", "options": ["ant", "bee"], "gold": i % 2} for i, word in enumerate(WORDS)]
    write_task(tmp_path, "shots", rows, **ASKED, num_fewshot=2, fewshot_split="test")
    live = live_model()
    tasks = load_tasks(["shots"], tasks_path=str(tmp_path))
    scores = measure_zero_shot(live, byte_tokenizer(), {"dense": None, "again": None, "more": None}, tasks)
    assert scores["dense"] == scores["again"] == scores["more"]
    assert "Say" in tasks["shots"].instances[0].args[0].split("\n\n")[1], "there were no examples"


def test_progress_counts_the_questions_of_all_models(live_model, tasks_path, monkeypatch):
    seen = []

    def track(items, what):
        for item in items:
            seen.append((item, len(items), what))
            yield item

    monkeypatch.setattr(zero_shot, "track", track)
    measure(live_model(), load_tasks(["ends"], tasks_path=str(tasks_path)), batch_size=4)
    assert seen == [(i, 3 * 17, "zero-shot") for i in range(3 * 17)]


# Scores


def test_scores_and_flips_by_hand():
    dense = ZeroShot({"a": TaskScore((True, True, False, False)), "b": TaskScore((True, False))})
    other = ZeroShot({"a": TaskScore((True, False, True, True)), "b": TaskScore((True, False))})
    assert (dense.mean, other.mean) == (0.5, 0.625)
    assert dense.tasks["a"].stderr == pytest.approx(np.std([1, 1, 0, 0], ddof=1) / 2)
    assert dense.mean_stderr == pytest.approx(math.sqrt(0.25 / 3 + 0.25 / 1) / 2)
    assert other.flip_rates(dense) == {"a": 0.75, "b": 0.0}
    assert other.as_row(dense) == {
        "zero_shot": {"a": 0.75, "b": 0.5},
        "zero_shot_stderr": {"a": 0.25, "b": 0.5},
        "zero_shot_questions": {"a": 4, "b": 2},
        "zero_shot_mean": 0.625,
        "zero_shot_mean_stderr": pytest.approx(math.hypot(0.25, 0.5) / 2),
        "flip_rate": 0.375,
        "flip_rate_by_task": {"a": 0.75, "b": 0.0},
    }
    assert not {"flip_rate", "flip_rate_by_task"} & set(dense.as_row(dense))


def test_equal_accuracy_can_hide_flips():
    dense, other = ZeroShot({"a": TaskScore((True, False))}), ZeroShot({"a": TaskScore((False, True))})
    assert dense.mean == other.mean
    assert other.as_row(dense)["flip_rate"] == 1.0


def test_a_single_question_has_no_standard_error():
    assert math.isnan(TaskScore((True,)).stderr)


def test_scores_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TaskScore((True,)).correct = ()


# What is refused


@pytest.mark.parametrize(
    ("tasks", "changes", "sentence"),
    [
        (["animals"], {"tasks_path": "/no/such"}, "evaluation.tasks_path=/no/such is no folder"),
        (["plants"], {}, "evaluation.tasks has 'plants', which is not among the task files in .*: it has animals_local, ends"),
        (["arc_easyy"], {"tasks_path": None}, "which is no task of lm-eval: did you mean arc_easy"),
    ],
)
def test_tasks_that_do_not_exist(tasks, changes, sentence, tasks_path):
    with pytest.raises(EvoPressError, match=sentence):
        check_tasks(tasks, **({"tasks_path": str(tasks_path)} | changes))


def test_a_folder_without_task_files(tmp_path):
    with pytest.raises(EvoPressError, match="it has none"):
        check_tasks(["piqa"], tasks_path=str(tmp_path))


def questions(count):
    return [{"question": f"Who is {i}?", "options": ["ant", "bee"], "gold": 0} for i in range(count)]


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        (["here"], 3),  # as lm_eval finds it
        (["folder"], 5),
        (["beside"], 7),
        (["here", "folder", "beside"], 3),
        (["folder", "beside"], 5),
    ],
)
@pytest.mark.parametrize("data_files", ["odd.jsonl", {"test": ["o*.jsonl"]}, {"test": "./odd.jsonl"}])
def test_data_is_where_lm_eval_finds_it_or_in_the_folder_or_beside_its_task(data_files, places, expected, tmp_path, monkeypatch):
    root, here = tmp_path / "mine", tmp_path / "here"
    kwargs = {"data_files": data_files}
    write_task(root, "odd", [], **ASKED, dataset_kwargs=kwargs, test_split="test" if isinstance(data_files, dict) else "train")
    (root / "odd.jsonl").unlink()
    here.mkdir()
    monkeypatch.chdir(here)
    for place, folder, count in (("here", here, 3), ("folder", root, 5), ("beside", root / "tasks", 7)):
        if place in places:
            (folder / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions(count)))
    assert len(load_tasks(["odd"], tasks_path=str(root))["odd"].eval_docs) == expected
    assert Path.cwd() == here


def test_the_same_task_file_as_lm_eval_reads_it(tmp_path, monkeypatch):
    """Started beside `data/`, with the task file in `tasks/`: as in lm-eval's guide to local data."""
    from lm_eval.tasks import TaskManager

    write_task(tmp_path / "tasks", "odd", questions(4), **ASKED, dataset_kwargs={"data_files": {"test": "data/odd.jsonl"}})
    (tmp_path / "data").mkdir()
    (tmp_path / "tasks" / "odd.jsonl").rename(tmp_path / "data" / "odd.jsonl")
    monkeypatch.chdir(tmp_path)
    theirs = TaskManager(include_path="tasks", include_defaults=False).load(["odd"])["tasks"]["odd"]
    mine = load_tasks(["odd"], tasks_path="tasks")["odd"]
    assert list(mine.eval_docs) == list(theirs.eval_docs) and len(mine.eval_docs) == 4


@pytest.mark.parametrize("damage", ["missing", "no JSON", "no such field"])
def test_questions_that_cannot_be_read(damage, tmp_path):
    wrong = {"doc_to_choice": "choices"} if damage == "no such field" else {}
    write_task(tmp_path, "odd", [{"question": "Who?", "options": ["ant", "bee"], "gold": 0}], **ASKED | wrong)
    if damage == "missing":
        (tmp_path / "odd.jsonl").unlink()
    elif damage == "no JSON":
        (tmp_path / "odd.jsonl").write_text("{nonsense")
    with pytest.raises(EvoPressError, match=r"the questions of task 'odd' cannot be loaded from the folder .*: check its task"):
        check_tasks(["odd"], tasks_path=str(tmp_path))


def test_a_task_that_is_not_scored_by_accuracy(tmp_path):
    rows = [{"question": "Who?", "options": ["ant", "bee"], "gold": 0}]
    metric = [{"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}]
    write_task(tmp_path, "odd", rows, **ASKED, metric_list=metric)
    with pytest.raises(EvoPressError, match="'odd', which is not a multiple-choice task with the metric acc"):
        check_tasks(["odd"], tasks_path=str(tmp_path))


def test_a_hub_that_cannot_be_reached(monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'allenai/ai2_arc' on the Hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(EvoPressError) as caught:
        check_tasks(["arc_easy"])
    assert str(caught.value) == (
        "the questions of task 'arc_easy' cannot be loaded from the hub (ConnectionError: Couldn't reach 'allenai/ai2_arc' on the "
        "Hub): check the network, or give evaluation.tasks_path=FOLDER"
    )


def test_lm_eval_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EvoPressError, match=r"needs lm-eval .*: run `pip install 'lm-eval\[hf\]'`"):
        check_tasks(["piqa"])


def test_a_batch_that_does_not_fit_the_device(live_model, tasks_path, monkeypatch):
    live = live_model()

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(live.blocks.model, "forward", full)
    with pytest.raises(EvoPressError, match="task_batch_size=64 sequences do not fit the memory of cpu: lower it"):
        measure(live, load_tasks(["ends"], tasks_path=str(tasks_path)), batch_size=64)


# The paper's tasks


@pytest.mark.skipif(not SHARED.is_dir(), reason="the local data sets are not beside the project")
@pytest.mark.parametrize("task", PAPER_TASKS)
def test_local_tasks_ask_what_lm_evals_own_do(task):
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(zero_shot._task_files(Path(lm_eval.__file__).parent / "tasks", [task])[task])
    files = {"data_files": dict.fromkeys(("validation", "test"), str(SHARED / f"{task}.jsonl"))}
    config |= {"dataset_path": "json", "dataset_name": None, "training_split": None, "dataset_kwargs": files}
    theirs = ConfigurableTask(config={key: value for key, value in config.items() if key != "tag"})
    mine = load_tasks([task], tasks_path=str(SHARED))[task]
    for one in (mine, theirs):
        one.build_all_requests(limit=40, rank=0, world_size=1)
    assert [instance.args for instance in mine.instances] == [instance.args for instance in theirs.instances]
    for own, other in zip(list(mine.eval_docs)[:40], list(theirs.eval_docs)[:40], strict=True):
        first = [(-float(i), False) for i in range(len(mine.doc_to_choice(own)))]
        assert mine.process_results(own, first)["acc"] == theirs.process_results(other, first)["acc"]


@pytest.mark.network
def test_the_papers_tasks_come_from_the_hub():
    tasks = load_tasks(PAPER_TASKS)
    assert list(tasks) == list(PAPER_TASKS)
    assert len(tasks["winogrande"].eval_docs) == 1267
