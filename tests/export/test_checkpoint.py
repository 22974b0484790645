import errno
import json
import math
import os

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from evopress.errors import EvoPressError
from evopress.evaluation.heldout import measure_held_out
from evopress.export import export_checkpoint
from evopress.export.checkpoint import Dequantized, parts_together
from evopress.export.exporter import Export, write_export
from evopress.fitness.population import PopulationEvaluator
from evopress.models.tiny import byte_tokenizer

PROVENANCE = {"model": "tiny", "database": "0123456789abcdef"}


@pytest.fixture
def genome_files(tmp_path):
    files = tmp_path / "run" / "genome.json", tmp_path / "run" / "genome.txt"
    files[0].parent.mkdir()
    for file in files:
        file.write_text(f"this is {file.name}")
    return files


def mixed(live):
    return tuple(i * 7 % 3 for i in range(len(live.space)))


def export(live, folder, genome_files, genome=None):
    return export_checkpoint(
        folder,
        live=live,
        model=live.blocks.model,
        tokenizer=byte_tokenizer(),
        genome=genome or mixed(live),
        genome_files=genome_files,
        provenance=PROVENANCE,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2", "opt"])
def test_the_folder_loads_as_an_ordinary_checkpoint(family, dtype, live_model, genome_files, tmp_path, tokens, weights_digest):
    live = live_model(family, num_blocks=4 if dtype == "float32" else 2, dtype=dtype)
    before = weights_digest(live.blocks.model)
    folder = export(live, tmp_path / "exported", genome_files)
    assert weights_digest(live.blocks.model) == before
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    state = model.state_dict()
    for unit, level in enumerate(mixed(live)):
        decoded = live.levels.read(unit, level).decode()
        assert torch.equal(state[f"{live.space.units[unit].name}.weight"], decoded)
    units = {f"{unit.name}.weight" for unit in live.space.units}
    for name, tensor in live.blocks.model.state_dict().items():
        assert name in units or torch.equal(state[name], tensor)

    sequences = tokens(4, 16, seed=5)
    expected = measure_held_out(PopulationEvaluator(live), [mixed(live)], sequences)[0]
    with torch.no_grad():
        logits = model.eval()(input_ids=sequences).logits[:, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten())
    assert math.exp(loss) == pytest.approx(expected.perplexity, rel=1e-4 if dtype == "float32" else 2e-2)


def test_genome_and_provenance_lie_beside_the_weights(live_model, genome_files, tmp_path):
    folder = export(live_model(), tmp_path / "deep" / "down" / "exported", genome_files)
    assert json.loads((folder / "evopress.json").read_text()) == PROVENANCE
    assert all((folder / file.name).read_text() == file.read_text() for file in genome_files)
    assert AutoTokenizer.from_pretrained(folder)("ab", add_special_tokens=False)["input_ids"]
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {(folder / "config.json").stat().st_mode & 0o777}
    assert list(folder.parent.iterdir()) == [folder]


def test_an_older_export_is_replaced_whole(live_model, genome_files, tmp_path):
    live = live_model()
    folder = export(live, tmp_path / "exported", genome_files, genome=(0,) * len(live.space))
    (folder / "of-the-old-one").write_text("x")
    export(live, folder, genome_files, genome=(2,) * len(live.space))
    assert not (folder / "of-the-old-one").exists()
    name = live.space.units[0].name
    weights = load_file(folder / "model.safetensors")
    assert torch.equal(weights[f"{name}.weight"], live.levels.read(0, 2).decode())


def test_a_link_stays_one_and_what_it_names_is_replaced(live_model, genome_files, tmp_path):
    live = live_model()
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for level in (0, 2):
        export(live, tmp_path / "link", genome_files, genome=(level,) * len(live.space))
        assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "model.safetensors").is_file()
    assert not list(tmp_path.glob(".*"))


class BrokenError(Exception):
    pass


def safetensors_error(code):
    return SafetensorError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize(
    ("error", "expected", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), EvoPressError, "disk is full"),
        (safetensors_error(errno.ENOSPC), EvoPressError, "disk is full"),
        (OSError(errno.EACCES, "Permission denied"), EvoPressError, "cannot be written"),
        (safetensors_error(errno.EROFS), EvoPressError, "cannot be written"),
        (BrokenError("broken"), BrokenError, "broken"),
    ],
)
@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_an_interrupted_export_leaves_no_half_folder(
    part, error, expected, sentence, older, live_model, genome_files, tmp_path, monkeypatch, weights_digest
):
    live = live_model()
    folder = tmp_path / "out" / "exported"
    if older:
        export(live, folder, genome_files)
    before = sorted(path.name for path in folder.iterdir()) if older else None
    digest = weights_digest(live.blocks.model)

    def fail(self, scratch, *args, **kwargs):
        (scratch / "model-00001-of-00002.safetensors").write_bytes(b"half")
        raise error

    target = type(live.blocks.model) if part == "model" else type(byte_tokenizer())
    monkeypatch.setattr(target, "save_pretrained", fail)
    with pytest.raises(expected, match=sentence):
        export(live, folder, genome_files)
    assert list(folder.parent.iterdir()) == ([folder] if older else [])
    if older:
        assert sorted(path.name for path in folder.iterdir()) == before
    assert weights_digest(live.blocks.model) == digest


def test_a_wrong_genome_writes_nothing(live_model, genome_files, tmp_path):
    with pytest.raises(EvoPressError, match="1 levels but"):
        export(live_model(), tmp_path / "out" / "exported", genome_files, genome=(0,))
    assert list((tmp_path / "out").iterdir()) == []


def tensors_of(folder):
    """Return all tensors of a checkpoint's files, each once."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        here = load_file(path)
        assert not found.keys() & here.keys()
        found |= here
    return found


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "opt"])
def test_a_large_model_is_written_in_files_of_a_few_blocks(family, live_model, genome_files, tmp_path, weights_digest, tokens):
    live = live_model(family)
    before, parts = weights_digest(live.blocks.model), list(live.blocks.parts)
    genome, size = mixed(live), sum(parameter.nbytes for parameter in live.blocks.blocks[0].parameters())
    assert parts_together(live.blocks, 10**9) == [parts] and parts_together(live.blocks, 2 * size) == [[0, 1], [2, 3], []]
    assert parts_together(live.blocks, 1) == [[0], [1], [2], [3], []]
    export_ = Export(live, live.blocks.model, byte_tokenizer(), genome)
    whole, files = (write_export(Dequantized(file_bytes=most), tmp_path / str(most), export_) for most in (10**9, 2 * size))
    assert weights_digest(live.blocks.model) == before
    wanted, found = tensors_of(whole), tensors_of(files)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert [path.name for path in sorted(whole.glob("*.safetensors"))] == ["model.safetensors"]
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    others = {path.name for path in whole.iterdir()} - {"model.safetensors"}
    assert {path.name for path in files.iterdir()} == {*names, "model.safetensors.index.json", *others}
    index = json.loads((files / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in wanted.values())
    assert index["weight_map"] == {name: path.name for path in files.glob("*.safetensors") for name in load_file(path)}
    ids = tokens(2, 8, seed=1)
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=ids).logits for folder in (whole, files)]
    assert torch.equal(*logits)


def test_no_more_than_one_file_s_blocks_are_decoded_at_a_time(live_model, genome_files, tmp_path, monkeypatch):
    live, seen = live_model(), []
    dense = {id(parameter): parameter.data_ptr() for parameter in live.blocks.model.parameters()}

    def save(model, folder, state_dict):
        changed = {i for i, block in enumerate(live.blocks.blocks) for p in block.parameters() if p.data_ptr() != dense[id(p)]}
        seen.append((changed, {name.split(".")[2] for name in state_dict if ".layers." in name}))
        original(model, folder, state_dict=state_dict)

    original = type(live.blocks.model).save_pretrained
    monkeypatch.setattr(type(live.blocks.model), "save_pretrained", save)
    write_export(Dequantized(file_bytes=1), tmp_path / "files", Export(live, live.blocks.model, byte_tokenizer(), mixed(live)))
    assert seen == [({i}, {str(i)}) for i in range(4)] + [(set(), set())]
