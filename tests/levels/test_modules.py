"""Modules that are dropped are modules whose output is zero, on every family; and a checkpoint without them computes the same."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from evopress.errors import EvoPressError
from evopress.fitness.plain import PlainEvaluator
from evopress.fitness.population import PopulationEvaluator
from evopress.levels.live import LiveModel
from evopress.levels.modules import ATTENTION, MLP, ModuleLevels, dropped_modules, ensure_modules, modules_of
from evopress.levels.store import LevelDatabase
from evopress.methods.drop import Drop
from evopress.models.blocks import BlockModel
from evopress.models.loading import load_pretrained
from evopress.models.tiny import make_tiny
from evopress.settings import DropSettings
from evopress.units import Genome, Space

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text", "opt")
IDS = torch.arange(2 * 24).reshape(2, 24) * 37 % 257


def load(folder: Path, family: str, num_blocks: int = 3) -> BlockModel:
    pretrained = load_pretrained(make_tiny(folder / family, family, num_blocks=num_blocks), dtype="float32")
    return BlockModel(pretrained.model, pretrained.family)


def space_of(blocks: BlockModel, granularity: str = "module") -> Space:
    method = Drop(DropSettings(granularity=granularity), sparsity=0.5, exchange="name")
    return method.space(blocks.shapes(), dtype_bits=32)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def with_zeroed_outputs(blocks: BlockModel, gone: set[tuple[int, str]]) -> torch.Tensor:
    """The model's own forward with the outputs of modules multiplied by zero: the slow, literal meaning of dropping them."""

    def zero(module: torch.nn.Module, args: object, output: object) -> object:
        return (output[0] * 0.0, *output[1:]) if isinstance(output, tuple) else output * 0.0

    handles = []
    for index, kind in gone:
        name = blocks.family.attention if kind == ATTENTION else blocks.family.mlp
        handles.append(blocks.blocks[index].get_submodule(name).register_forward_hook(zero))
    try:
        return logits(blocks.model)
    finally:
        for handle in handles:
            handle.remove()


GENOMES: tuple[Genome, ...] = (
    (1, 0, 0, 0, 0, 0),
    (0, 1, 0, 0, 0, 0),
    (1, 1, 0, 0, 0, 0),
    (0, 0, 1, 1, 1, 0),
    (0, 1, 1, 1, 1, 1),
    (1,) * 6,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dropped_module_is_one_whose_output_is_zero(tmp_path: Path, family: str) -> None:
    blocks = load(tmp_path, family)
    dense = logits(blocks.model)
    space = space_of(blocks)
    live = LiveModel(blocks, ModuleLevels(space))
    expected = [with_zeroed_outputs(blocks, dropped_modules(space, genome)) for genome in GENOMES]
    for genome, literal in zip(GENOMES, expected, strict=True):
        with live.applied(genome):
            torch.testing.assert_close(logits(blocks.model), literal, rtol=0, atol=1e-6)
        assert genome == (0,) * 6 or not torch.equal(literal, dense)
    head = blocks.head()
    for evaluator in (PopulationEvaluator(live), PlainEvaluator(live)):
        state_of, states = evaluator.final_states([None, *GENOMES], IDS)
        for index, literal in zip(state_of, [dense, *expected], strict=True):
            torch.testing.assert_close(head.logits(states[index]), literal.float(), rtol=0, atol=1e-5)
    assert torch.equal(logits(blocks.model), dense)  # and everything is back
    assert not any("forward" in module.__dict__ for module in blocks.model.modules())


def test_what_is_dropped_is_not_run(tmp_path: Path) -> None:
    blocks = load(tmp_path, "llama")
    live = LiveModel(blocks, ModuleLevels(space_of(blocks)))
    ran: list[str] = []
    for name, module in blocks.model.named_modules():
        if isinstance(module, torch.nn.Linear) or name.endswith("layernorm"):
            module.register_forward_pre_hook(lambda module, args, name=name: ran.append(name))
    evaluator = PopulationEvaluator(live)
    evaluator.final_states([(1, 0, 1, 1, 0, 1)], IDS)
    inside = [name.split("layers.")[1] for name in ran if "layers." in name]
    kept = {"0.post_attention_layernorm", "2.input_layernorm"}
    kept |= {f"0.mlp.{part}_proj" for part in ("gate", "up", "down")} | {f"2.self_attn.{part}_proj" for part in "qkvo"}
    linears = {name for name in inside if name.endswith("_proj")}
    assert linears == {name for name in kept if name.endswith("_proj")}
    assert evaluator.num_block_tokens == 2 * IDS.numel()  # the block that is dropped whole costs nothing


@pytest.mark.parametrize("granularity", ["module", "block", "pair"])
def test_units_of_each_granularity_stand_for_all_modules(tmp_path: Path, granularity: str) -> None:
    blocks = load(tmp_path, "llama", num_blocks=4)
    space = space_of(blocks, granularity)
    LiveModel(blocks, ModuleLevels(space))  # checks that they fit
    every = [module for unit in space.units for module in modules_of(unit)]
    assert sorted(every) == sorted((block, kind) for block in range(4) for kind in (ATTENTION, MLP))
    total = sum(parameter.numel() for block in blocks.blocks for parameter in block.parameters())
    norms = sum(p.numel() for block in blocks.blocks for name, p in block.named_parameters() if "layernorm" in name)
    assert space.size == (total - norms if granularity == "module" else total)


def test_a_space_of_another_model_is_refused(tmp_path: Path) -> None:
    space = space_of(load(tmp_path, "llama", num_blocks=4))
    with pytest.raises(EvoPressError, match="of another model"):
        LiveModel(load(tmp_path, "qwen2", num_blocks=3), ModuleLevels(space))


def test_a_model_that_normalises_its_residual_stream_is_refused(tmp_path: Path) -> None:
    blocks = load(tmp_path, "opt")
    for block in blocks.blocks:
        block.do_layer_norm_before = False  # as in OPT-350m
    with pytest.raises(EvoPressError, match="normalise the residual stream"):
        LiveModel(blocks, ModuleLevels(space_of(blocks)))
    assert not any("forward" in module.__dict__ for module in blocks.model.modules())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("genome", [(1, 1, 0, 0, 0, 0), (0, 1, 1, 1, 1, 0), (1, 0, 0, 1, 0, 0)], ids=["whole", "mixed", "single"])
def test_a_written_checkpoint_computes_what_the_live_model_does(tmp_path: Path, family: str, genome: Genome) -> None:
    blocks = load(tmp_path, family)
    live = LiveModel(blocks, ModuleLevels(space_of(blocks)))
    before = {name: tensor.clone() for name, tensor in blocks.model.state_dict().items()}
    config = blocks.model.config.to_dict()
    with live.applied(genome):
        expected = logits(blocks.model)
    with live.written(genome):
        blocks.model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    whole = sum(genome[2 * i] and genome[2 * i + 1] for i in range(3))
    assert loaded.config.num_hidden_layers == 3 - whole
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)
    cached = loaded.generate(IDS[:1, :8], max_new_tokens=6, do_sample=False, use_cache=True)
    plain = loaded.generate(IDS[:1, :8], max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)
    after = blocks.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert blocks.model.config.to_dict() == config


def test_the_database_of_modules_is_a_manifest(tmp_path: Path) -> None:
    space = space_of(load(tmp_path / "model", "llama"))
    made, reused = ensure_modules(tmp_path, model_name="m", method="drop", recipe={"a": 1}, space=space)
    assert not reused and made.space == space
    assert [path.name for path in made.folder.iterdir()] == ["manifest.json"]
    again, reused = ensure_modules(tmp_path, model_name="m", method="drop", recipe={"a": 1}, space=space)
    assert reused and again.folder == made.folder and LevelDatabase.open(made.folder).space == space
    other, _ = ensure_modules(tmp_path, model_name="m", method="drop", recipe={"a": 2}, space=space)
    assert other.folder != made.folder
    path = made.folder / "manifest.json"
    path.write_text(path.read_text().replace("drop", "dorp", 1))  # damaged: written again
    _, reused = ensure_modules(tmp_path, model_name="m", method="drop", recipe={"a": 1}, space=space)
    assert not reused and LevelDatabase.open(made.folder).space == space


def test_damage_where_nothing_can_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(**options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    space = space_of(load(tmp_path / "model", "llama"))
    made, _ = ensure_modules(tmp_path, model_name="m", method="drop", recipe={}, space=space)
    (made.folder / "manifest.json").write_text("{}")
    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    with pytest.raises(EvoPressError, match=r"manifest\.json has schema .*, and it cannot be built again: .*cannot be written"):
        ensure_modules(tmp_path, model_name="m", method="drop", recipe={}, space=space)


def test_what_a_killed_run_left_beside_the_manifest_is_removed(tmp_path: Path) -> None:
    space = space_of(load(tmp_path / "model", "llama"))
    for _ in range(2):  # the manifest is written, then found
        database, _ = ensure_modules(tmp_path, model_name="m", method="drop", recipe={}, space=space)
        left = database.folder / ".scores-0.json.12-ab.tmp"
        assert not left.exists()
        left.touch()
