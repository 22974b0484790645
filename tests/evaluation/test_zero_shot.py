import dataclasses
import logging
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tokenizers.processors import TemplateProcessing

from evopress.errors import EvoPressError
from evopress.evaluation import zero_shot
from evopress.evaluation.tasks import count_asked, load_tasks, num_questions
from evopress.evaluation.zero_shot import TaskScore, ZeroShot, measure_zero_shot
from evopress.export import export_checkpoint
from evopress.levels.live import LiveModel
from evopress.levels.modules import ModuleLevels
from evopress.methods.drop import Drop
from evopress.models import attention
from evopress.models.tiny import byte_tokenizer
from evopress.settings import DropSettings

pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval[hf] is not installed")


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


@pytest.mark.parametrize("limit", [None, 5])
def test_a_group_counts_all_its_questions_as_lm_eval_does(limit, live_model, write_task, tmp_path, monkeypatch):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    for name, count in (("few", 4), ("many", 13)):
        rows = [{"question": f"{name} {i}?", "options": ["ant", "bee", "owl"], "gold": i % 3} for i in range(count)]
        write_task(tmp_path, name, rows, tag="kinds")
    weighed = {"aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    for group in ({"group": "inner", "task": ["kinds"], **weighed}, {"group": "all", "task": ["inner"], **weighed}):
        (tmp_path / "tasks" / f"{group['group']}.yaml").write_text(yaml.safe_dump(group))
    (tmp_path / "tasks" / "loose.yaml").write_text(yaml.safe_dump({"group": "loose", "task": ["few", "many"]}))
    with pytest.raises(EvoPressError, match=r"'loose', a group whose accuracy is not that of all its .*: name its tasks, few,"):
        load_tasks(["loose"], tasks_path=str(tmp_path))

    live = live_model("llama", num_blocks=2, dtype="float32")
    tasks = load_tasks(["all", "few"], tasks_path=str(tmp_path))
    scores = measure_zero_shot(live, byte_tokenizer(), {"dense": None}, tasks, limit=limit)["dense"].tasks
    assert scores["all"].num_questions == num_questions(tasks["all"], limit) == (17 if limit is None else 9)
    assert scores["few"].correct == scores["all"].correct[:4]
    assert count_asked(tasks, byte_tokenizer(), limit=limit).tokens > count_asked({"few": tasks["few"]}, byte_tokenizer()).tokens
    monkeypatch.chdir(tmp_path)
    theirs = lm_eval.simple_evaluate(
        HFLM(pretrained=live.blocks.model, tokenizer=byte_tokenizer(), batch_size=8),
        tasks=["all"],
        task_manager=TaskManager(include_path="tasks", include_defaults=False),
        limit=limit,
        bootstrap_iters=0,
    )
    assert scores["all"].accuracy == pytest.approx(theirs["results"]["all"]["acc,none"], abs=1e-12)


def test_a_question_counts_once_however_many_filters_a_task_has(live_model, write_task, tmp_path):
    rows = [{"question": f"Who is {i}?", "options": ["ant", "bee", "owl"], "gold": i % 3} for i in range(7)]
    filters = [{"name": name, "filter": [{"function": "take_first"}]} for name in ("first", "second")]
    write_task(tmp_path, "plain", rows)
    write_task(tmp_path, "filtered", rows, filter_list=filters)
    tasks = load_tasks(["plain", "filtered"], tasks_path=str(tmp_path))
    scores = measure_zero_shot(live_model(), byte_tokenizer(), {"dense": None}, tasks)["dense"].tasks
    assert scores["filtered"] == scores["plain"] and scores["filtered"].num_questions == 7


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


@pytest.mark.parametrize(("added", "bos"), [(True, "auto"), (True, "false"), (False, "auto")])
@pytest.mark.parametrize("limit", [None, 5])
def test_what_is_asked_is_what_enters_the_model(added, bos, limit, live_model, tasks_path, monkeypatch):
    tokenizer, tasks = tokenizer_with_bos(added=added), load_tasks(["animals", "ends"], tasks_path=str(tasks_path))
    live, entered = live_model("llama", num_blocks=2), []
    forward = live.blocks.model.forward
    monkeypatch.setattr(live.blocks.model, "forward", lambda ids, **rest: entered.append(ids.numel()) or forward(ids, **rest))
    measure_zero_shot(live, tokenizer, {"dense": None}, tasks, limit=limit, batch_size=1, bos=bos)
    asked = count_asked(tasks, tokenizer, bos=bos, limit=limit)
    assert (asked.tokens, asked.longest) == (sum(entered), max(entered))


def test_a_bos_that_the_tokenizer_adds_is_lm_evals(live_model, tasks_path, tmp_path, monkeypatch):
    tokenizer = tokenizer_with_bos(added=True)
    monkeypatch.setitem(globals(), "byte_tokenizer", lambda: tokenizer)
    live = live_model("llama", num_blocks=2)
    compare_with_lm_eval(live, genomes_of(live), tasks_path, tmp_path, monkeypatch)


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
    monkeypatch.setattr(LiveModel, "applied", None)  # nor is it decoded
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


def test_draws_of_a_task_do_not_reach_the_generators(tmp_path, live_model, write_task):
    """Some tasks shuffle their questions with the global generators."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "shuffling.py").write_text(
        "import random\nimport numpy as np\nimport torch\n\n"
        "def docs(dataset):\n    random.seed(1), np.random.seed(1), torch.manual_seed(1)\n    return dataset\n"
    )
    rows = [{"question": "Who?", "options": ["ant", "bee"], "gold": 0}, {"question": "What?", "options": ["owl", "rat"], "gold": 1}]
    write_task(tmp_path, "shuffled", rows)
    path = tmp_path / "tasks" / "shuffled.yaml"
    path.write_text(path.read_text() + "process_docs: !function shuffling.docs\n")
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    measure(live_model(), load_tasks(["shuffled"], tasks_path=str(tmp_path)))
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states


def test_examples_before_the_question_are_the_same_for_all_genomes(tmp_path, live_model, write_task):
    words = (
        "ant",
        "bee",
        "cat",
        "dog",
        "elk",
        "fox",
        "gnu",
        "hen",
        "ibis",
        "jay",
        "kite",
        "lark",
        "mole",
        "newt",
        "owl",
        "pig",
        "rat",
    )
    rows = [{"question": f"Say {word}", "options": ["ant", "bee"], "gold": i % 2} for i, word in enumerate(words)]
    write_task(tmp_path, "shots", rows, num_fewshot=2, fewshot_split="test")
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


def test_a_batch_that_does_not_fit_the_device(live_model, tasks_path, monkeypatch):
    live = live_model()

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(live.blocks.model, "forward", full)
    with pytest.raises(EvoPressError, match="task_batch_size=64 sequences do not fit the memory of cpu: lower it"):
        measure(live, load_tasks(["ends"], tasks_path=str(tasks_path)), batch_size=64)
