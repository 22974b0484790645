import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from evopress.errors import EvoPressError
from evopress.evaluation import tasks as lm_eval_tasks
from evopress.evaluation.tasks import PAPER_TASKS, check_questions, count_asked, load_tasks
from evopress.models.tiny import byte_tokenizer

pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval[hf] is not installed")

SHARED = Path(__file__).parents[3] / "shared" / "data" / "zeroshot"

# What is loaded, and what is refused


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
        load_tasks(tasks, **({"tasks_path": str(tasks_path)} | changes))


def test_a_folder_without_task_files(tmp_path):
    with pytest.raises(EvoPressError, match="it has none"):
        load_tasks(["piqa"], tasks_path=str(tmp_path))


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
def test_data_is_where_lm_eval_finds_it_or_in_the_folder_or_beside_it(
    data_files, places, expected, tmp_path, monkeypatch, write_task
):
    root, here = tmp_path / "mine", tmp_path / "here"
    kwargs = {"data_files": data_files}
    write_task(root, "odd", [], dataset_kwargs=kwargs, test_split="test" if isinstance(data_files, dict) else "train")
    (root / "odd.jsonl").unlink()
    here.mkdir()
    monkeypatch.chdir(here)
    for place, folder, count in (("here", here, 3), ("folder", root, 5), ("beside", root / "tasks", 7)):
        if place in places:
            (folder / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions(count)))
    assert len(load_tasks(["odd"], tasks_path=str(root))["odd"].eval_docs) == expected
    assert Path.cwd() == here


def test_lm_evals_own_tasks_are_found_however_their_files_name_them():
    """MMLU's quote the key: `"task": "mmlu_anatomy"`."""
    import lm_eval

    own = Path(lm_eval.__file__).parent / "tasks"
    names = ["piqa", "mmlu_anatomy", "gpqa_main_zeroshot", "bbh_zeroshot_navigate", "hellaswag"]
    found = lm_eval_tasks._task_files(own, names)
    assert list(found) == names and found["mmlu_anatomy"].parent.parent.name == "mmlu"


def test_what_a_task_draws_is_what_lm_eval_would_draw(tmp_path, monkeypatch, write_task):
    from lm_eval.defaults import DEFAULT_RANDOM_SEED
    from lm_eval.tasks import TaskManager

    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "shuffling.py").write_text(
        "import random\n\ndef docs(dataset):\n    return dataset.select(random.sample(range(len(dataset)), len(dataset)))\n"
    )
    write_task(tmp_path, "shuffled", questions(20))
    path = tmp_path / "tasks" / "shuffled.yaml"
    path.write_text(path.read_text() + "process_docs: !function shuffling.docs\n")
    random.seed(99)
    first = list(load_tasks(["shuffled"], tasks_path=str(tmp_path))["shuffled"].task_docs)
    random.seed(7)
    assert first == list(load_tasks(["shuffled"], tasks_path=str(tmp_path))["shuffled"].task_docs) != questions(20)
    monkeypatch.chdir(tmp_path)
    random.seed(DEFAULT_RANDOM_SEED)
    assert (
        list(TaskManager(include_path="tasks", include_defaults=False).load(["shuffled"])["tasks"]["shuffled"].task_docs) == first
    )


def test_the_same_task_file_as_lm_eval_reads_it(tmp_path, monkeypatch, write_task):
    """Started beside `data/`, with the task file in `tasks/`: as in lm-eval's guide to local data."""
    from lm_eval.tasks import TaskManager

    write_task(tmp_path / "tasks", "odd", questions(4), dataset_kwargs={"data_files": {"test": "data/odd.jsonl"}})
    (tmp_path / "data").mkdir()
    (tmp_path / "tasks" / "odd.jsonl").rename(tmp_path / "data" / "odd.jsonl")
    monkeypatch.chdir(tmp_path)
    theirs = TaskManager(include_path="tasks", include_defaults=False).load(["odd"])["tasks"]["odd"]
    mine = load_tasks(["odd"], tasks_path="tasks")["odd"]
    assert list(mine.eval_docs) == list(theirs.eval_docs) and len(mine.eval_docs) == 4


@pytest.mark.parametrize("damage", ["missing", "no JSON", "no such field"])
def test_questions_that_cannot_be_read(damage, tmp_path, write_task):
    wrong = {"doc_to_choice": "choices"} if damage == "no such field" else {}
    write_task(tmp_path, "odd", [{"question": "Who?", "options": ["ant", "bee"], "gold": 0}], **wrong)
    if damage == "missing":
        (tmp_path / "odd.jsonl").unlink()
    elif damage == "no JSON":
        (tmp_path / "odd.jsonl").write_text("{nonsense")
    with pytest.raises(EvoPressError, match=r"the questions of task 'odd' cannot be loaded from the folder .*: check its task"):
        load_tasks(["odd"], tasks_path=str(tmp_path))


def test_a_task_that_is_not_scored_by_accuracy(tmp_path, write_task):
    rows = [{"question": "Who?", "options": ["ant", "bee"], "gold": 0}]
    metric = [{"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}]
    write_task(tmp_path, "odd", rows, metric_list=metric)
    with pytest.raises(EvoPressError, match="'odd', which is not a multiple-choice task with the metric acc"):
        load_tasks(["odd"], tasks_path=str(tmp_path))


def test_a_hub_that_cannot_be_reached(monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'allenai/ai2_arc' on the Hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(EvoPressError) as caught:
        load_tasks(["arc_easy"])
    assert str(caught.value) == (
        "the questions of task 'arc_easy' cannot be loaded from the hub (ConnectionError: Couldn't reach 'allenai/ai2_arc' on the "
        "Hub): check the network, or give evaluation.tasks_path=FOLDER"
    )


def test_lm_eval_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EvoPressError, match=r"needs lm-eval .*: run `pip install 'lm-eval\[hf\]'`"):
        load_tasks(["piqa"])


def test_a_question_with_a_token_beyond_the_embedding_is_refused(tasks_path):
    tokenizer, tasks = byte_tokenizer(), load_tasks(["animals", "ends"], tasks_path=str(tasks_path))
    check_questions(tasks, tokenizer, num_rows=257)
    tokenizer.add_tokens(["nowhere"])
    check_questions(tasks, tokenizer, num_rows=257)
    tokenizer.add_tokens(["Question"])
    with pytest.raises(
        EvoPressError, match=r"questions of task 'animals' have the token 'Question' \(id 258\).* leave the task out"
    ):
        check_questions(tasks, tokenizer, num_rows=257)


# The paper's tasks


@pytest.mark.skipif(not SHARED.is_dir(), reason="the local data sets are not beside the project")
@pytest.mark.parametrize("task", PAPER_TASKS)
def test_local_tasks_ask_what_lm_evals_own_do(task):
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(lm_eval_tasks._task_files(Path(lm_eval.__file__).parent / "tasks", [task])[task])
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


# What is asked


def test_prompts_are_counted_as_far_as_the_model_sees_them(tmp_path, write_task):
    write_task(tmp_path, "huge", [{"question": "Who?" * 1000, "options": ["ant", "bees"], "gold": 0}])
    tasks = load_tasks(["huge"], tasks_path=str(tmp_path))
    assert count_asked(tasks, byte_tokenizer()).longest == 512  # of the tokenizer
    assert count_asked(tasks, byte_tokenizer(), config=SimpleNamespace(max_position_embeddings=300)).longest == 300


def test_an_answer_that_lm_eval_cannot_score_is_refused(tmp_path, write_task):
    write_task(tmp_path, "odd", [{"question": "Who?", "options": ["ant", "b" * 600], "gold": 0}])
    with pytest.raises(
        EvoPressError, match=r"'odd' is 601 tokens long, more than the model's 512 positions .*: leave the task out"
    ):
        count_asked(load_tasks(["odd"], tasks_path=str(tmp_path)), byte_tokenizer())
    with pytest.raises(EvoPressError, match=r"'odd' has no token \('d' after 'an'\), so lm-eval cannot score it"):  # it merges
        lm_eval_tasks._check_answers("odd", [("an", "d")], [[7]], [[6]], 512)


def test_many_questions_are_counted_by_some_of_them(tmp_path, write_task, monkeypatch):
    rows = [{"question": f"Who is {i}" + "?" * (i * i % 53), "options": ["ant", "bees"], "gold": 0} for i in range(1000)]
    write_task(tmp_path, "many", rows)
    tasks = load_tasks(["many"], tasks_path=str(tmp_path))
    some = count_asked(tasks, byte_tokenizer())
    monkeypatch.setattr(lm_eval_tasks, "_LOOKED_AT", 1000)
    every = count_asked(tasks, byte_tokenizer())
    assert some != every
    assert some.tokens == pytest.approx(every.tokens, rel=0.02) and 60 < some.longest <= every.longest
