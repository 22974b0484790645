import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evopress.errors import EvoPressError
from evopress.models import loading
from evopress.models.loading import (
    digest_files,
    digest_model,
    fetch_from_hub,
    find_weights,
    load_pretrained,
    pick_device,
    read_config,
    safe_name,
)
from evopress.models.stored import Stored, check_shapes


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A checkpoint that a test may spoil."""
    return shutil.copytree(tiny_folder("llama", num_blocks=1), tmp_path / "some model")


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_checkpoint_is_loaded_in_the_dtype_asked_for(dtype, folder):
    pretrained = load_pretrained(folder, dtype=dtype)
    assert {parameter.dtype for parameter in pretrained.model.parameters()} == {getattr(torch, dtype)}
    assert not pretrained.model.training
    assert not any(parameter.requires_grad for parameter in pretrained.model.parameters())
    assert pretrained.family.name == "llama"
    assert pretrained.name == "some-model"
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(pretrained.model.state_dict()[name], stored[name].to(getattr(torch, dtype)))


def test_the_digest_depends_on_weights_and_config(folder):
    first = load_pretrained(folder).digest
    assert load_pretrained(folder, dtype="float16").digest == first
    change_config(folder, rope_theta=5000.0)
    second = load_pretrained(folder).digest
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert len({first, second, load_pretrained(folder).digest}) == 3


OWN_CODE = """
from transformers import LlamaForCausalLM


class Own(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = {scale} * output.logits
        return output
"""


def test_the_digest_depends_on_code_beside_the_weights_where_it_runs_them(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    plain = digest_model(folder)
    (folder / "own.py").write_text(OWN_CODE.format(scale=2.0))
    assert digest_model(folder) == digest_model(folder, trust_remote_code=True) == plain, "nothing names the code"
    change_config(folder, auto_map={"AutoModelForCausalLM": "own.Own"})
    built_in, own = (load_pretrained(folder, dtype="float32", trust_remote_code=trusted) for trusted in (False, True))
    assert (type(built_in.model).__name__, type(own.model).__name__) == ("LlamaForCausalLM", "Own")
    ids = torch.arange(8).unsqueeze(0)
    assert not torch.equal(built_in.model(input_ids=ids).logits, own.model(input_ids=ids).logits)
    assert built_in.digest == digest_files([folder / "model.safetensors", folder / "config.json"]) != own.digest
    assert own.digest == digest_model(folder, trust_remote_code=True)
    (folder / "own.py").write_text(OWN_CODE.format(scale=3.0))
    assert digest_model(folder) == built_in.digest
    assert digest_model(folder, trust_remote_code=True) not in (own.digest, built_in.digest)


def no_folder(folder):
    shutil.rmtree(folder)


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def pickled(folder):
    no_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")


def no_config(folder):
    (folder / "config.json").unlink()


def broken_config(folder):
    (folder / "config.json").write_text("{")


def list_config(folder):
    (folder / "config.json").write_text("[]")


def unknown_architecture(folder):
    change_config(folder, model_type="t5")


def no_architecture(folder):
    config = read_config(folder)
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config))


def quantized(folder):
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def not_safetensors(folder):
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def lacks_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def other_shapes(folder):
    change_config(folder, intermediate_size=48)


def no_index(folder):
    weights = load_file(folder / "model.safetensors")
    no_weights(folder)
    for number, part in enumerate((sorted(weights)[::2], sorted(weights)[1::2]), start=1):
        path = folder / f"model-{number:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, path, metadata={"format": "pt"})


def no_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


SPOILED = {
    no_folder: "is not a folder",
    no_weights: "no weights: expected model.safetensors",
    pickled: r"only pickled weights \(pytorch_model\.bin\)",
    no_config: r"has no config\.json",
    broken_config: "cannot be read as JSON",
    list_config: "not a JSON object",
    unknown_architecture: r"architecture 't5' is no causal language model of transformers",
    no_architecture: r"architecture '' is unknown to transformers",
    quantized: r"already quantized \(gptq\)",
    truncated: "could not be loaded",
    not_safetensors: "could not be loaded",
    lacks_a_weight: r"lack model\.layers\.0\.mlp\.up_proj\.weight",
    other_shapes: r"have model\.layers\.0\.mlp\.down_proj\.weight as \[32, 64\], where config\.json makes it \[32, 48\], and 2",
    no_index: r"holds model-00001-of-00002\.safetensors and 1 more, expected model\.safetensors, or shards and model",
    no_tokenizer: "could not be loaded",
}


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__)
def test_a_checkpoint_that_cannot_be_used_is_one_sentence(spoil, folder):
    spoil(folder)
    with pytest.raises(EvoPressError, match=SPOILED[spoil]) as caught:
        load_pretrained(folder)
    sentence = str(caught.value)
    assert folder.name in sentence or "architecture" in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("spoil", [other_shapes, no_index], ids=lambda spoil: spoil.__name__)
def test_what_the_heads_of_files_tell_is_refused_before_weights_are_read(spoil, folder, monkeypatch):
    spoil(folder)
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("weights were read"))
    with pytest.raises(EvoPressError, match=SPOILED[spoil]):
        load_pretrained(folder)


def test_axes_that_transformers_turns_round_are_let_pass():
    """As those of Qwen3-VL's experts."""
    tensors = {"weight": Stored("F32", (3, 2)), "elsewhere": Stored("F32", (9,))}
    check_shapes(Path("m"), tensors, torch.nn.Linear(3, 2))
    with pytest.raises(
        EvoPressError, match=r"^the weights in m have weight as \[3, 2\], where config\.json makes it \[2, 4\]: correct"
    ):
        check_shapes(Path("m"), tensors, torch.nn.Linear(4, 2))


def test_no_quantization_is_no_quantization(folder):
    change_config(folder, quantization_config=None)
    assert [path.name for path in find_weights(folder)] == ["model.safetensors"]
    load_pretrained(folder)


def test_pickles_beside_safetensors_are_not_touched(folder):
    (folder / "pytorch_model.bin").write_bytes(b"rubbish")
    load_pretrained(folder)


def test_an_unknown_dtype_is_refused(folder):
    with pytest.raises(EvoPressError, match=r"model\.dtype 'int8' is not one of float32, bfloat16, float16"):
        load_pretrained(folder, dtype="int8")


@pytest.mark.parametrize("name", ["flash_attention_2", "rubbish"])
def test_attention_that_is_not_there_is_refused(name, folder):
    with pytest.raises(EvoPressError, match="could not be loaded"):
        load_pretrained(folder, attn_implementation=name)


def test_eager_attention_is_taken_when_asked_for(folder):
    pretrained = load_pretrained(folder, attn_implementation="eager")
    assert pretrained.model.config._attn_implementation == "eager"


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(EvoPressError, match=r"device 'cuda' was asked for but torch .* sees 0 CUDA devices"):
        pick_device("cuda")
    with pytest.raises(EvoPressError, match="'gpu' is not a device name"):
        pick_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("auto") == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(EvoPressError, match=r"'cuda:2'.* sees 2"):
        pick_device("cuda:2")


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("meta-llama/Llama-2-7b-hf", "meta-llama--Llama-2-7b-hf"),
        ("/home/me/my model/", "home--me--my-model"),
        ("../..", "model"),
        ("", "model"),
        ("äöü", "model"),
        ("a:b*c?", "a-b-c"),
    ],
)
def test_names_that_any_file_system_takes(name, safe):
    assert safe_name(name) == safe


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch):
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(EvoPressError, match=r"'some/model' could not be fetched .*ConnectionError: no route\).*model\.path=DIR"):
        fetch_from_hub("some/model", revision=None)


def test_nothing_is_unpickled(folder, monkeypatch):
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("torch.load was called"))
    load_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_a_stored_causal_mask_is_neither_codes_nor_a_bias(dtype, folder):
    path = folder / "model.safetensors"
    mask = {"model.layers.0.attention.bias": torch.ones(1, 1, 8, 8).tril().to(dtype)}
    save_file(load_file(path) | mask, path, metadata={"format": "pt"})
    load_pretrained(folder, dtype="float32")
    save_file(load_file(path) | {"model.layers.0.attention.bias": torch.ones(8).to(dtype)}, path, metadata={"format": "pt"})
    with pytest.raises(EvoPressError, match=r"already quantized|has no place for"):
        load_pretrained(folder, dtype="float32")


def test_widths_of_each_block_are_sizes(folder):
    change_config(folder, intermediate_size=[64])
    find_weights(folder)
    change_config(folder, intermediate_size=[64, -1])
    with pytest.raises(EvoPressError, match=r"intermediate_size=\[64, -1\], expected a whole number"):
        find_weights(folder)


@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_a_model_is_fetched_where_it_may_run(trusted, folder, monkeypatch):
    asked = []
    monkeypatch.setattr(loading, "_snapshot", lambda *args: asked.append(args[-1]) or folder)
    fetch_from_hub("some/model", revision=None, trust_remote_code=trusted)
    assert ("*.py" in asked[0]) == trusted and "*.model" in asked[0] and asked[1] == ["model.safetensors"]
