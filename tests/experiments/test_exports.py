"""Exported files in their engines: what is measured of them, and the price of an engine's rules."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from experiments.exports import llama_cpp, rules, run
from experiments.exports.engines import bytes_of, engine_of
from experiments.exports.mixes import dense_file, importance_of, row_of, workspace_of
from experiments.exports.rules import arguments_of, table


def test_a_file_is_measured_by_its_logits_on_the_same_tokens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(11, (3, 6), generator=rng)
    dense, own = torch.randn(2, 3, 6, 11, generator=rng).unbind()
    shown = {"dense": iter(dense), "own": iter(own)}

    class Fake:
        def __init__(self, name: str) -> None:
            self.name = name

        def logits(self, sequence: Any) -> Any:
            return next(shown[self.name]).numpy()

    @contextmanager
    def opened(path: Path, engine: str, **further: Any) -> Iterator[Fake]:
        yield Fake(path.stem)

    monkeypatch.setattr(run, "opened", opened)
    base = run.reference(Path("dense.gguf"), tokens.numpy(), tmp_path / "scratch")
    found = run.measured(Path("own.gguf"), "llama.cpp", tokens.numpy(), base)
    p, q = (logits[:, :-1].double().log_softmax(-1) for logits in (dense, own))
    assert found["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    loss = torch.nn.functional.cross_entropy(own[:, :-1].reshape(-1, 11), tokens[:, 1:].reshape(-1))
    assert found["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-5) and found["tokens"] == 15
    assert found["top1_agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


def test_the_price_is_the_difference_on_the_same_seed() -> None:
    rows = [
        {"size": "1MB", "engine": engine, "seed": seed, "row": name, "kl": kl + seed, "bytes": 5}
        for name, engine, kl in (("evopress", "none", 1.0), ("dp", "none", 9.0), ("evopress", "vllm", 1.25))
        for seed in (0, 1)
    ]
    found = table(pd.DataFrame([*rows, {"size": "1MB", "engine": "llama_cpp", "seed": 0, "said": "cannot"}]))
    assert found["engine"].tolist() == ["none", "vllm"] and found["price"].tolist() == [0.0, 0.25]
    assert found["kl"].tolist() == [1.5, 1.75] and found["seeds"].tolist() == [2, 2]
    assert "+method=gguf" in arguments_of("llama_cpp", "1MB") and "export=[compressed_tensors]" in arguments_of("vllm", "1MB")


def test_what_the_table_of_rules_has_is_not_run_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[str] = []

    def fake(folder: Path, arguments: list[str], *, then: str) -> bool:
        ran.append(folder.name)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").write_text(json.dumps({"exports": {"gptq": {"bytes": 7}}}))
        return "llama_cpp" not in folder.name

    monkeypatch.setattr(rules, "has_run", fake)
    monkeypatch.setattr(rules, "why_it_failed", lambda folder: "cannot")
    monkeypatch.setattr(rules, "rows_of", lambda folder: [{"row": name, "kl": 1.0} for name in ("dp", "evopress")])
    common = f"rules --sizes 1MB --runs {tmp_path} --results {tmp_path / 'rules.csv'} --engines llama_cpp none".split()
    for further in (["--seeds", "0"], ["gptqmodel", "--seeds", "0", "1"]):
        monkeypatch.setattr(sys, "argv", [*common, *further])
        rules.main()
    names = ["llama_cpp-1MB-seed-0", "none-1MB-seed-0", "llama_cpp-1MB-seed-0", "gptqmodel-1MB-seed-0"]
    assert ran == [*names, *(f"{engine}-1MB-seed-1" for engine in ("llama_cpp", "none", "gptqmodel"))]
    found = pd.read_csv(tmp_path / "rules.csv")
    assert found.groupby(["engine", "seed"]).size().to_dict() == {
        ("gptqmodel", 0): 2, ("gptqmodel", 1): 2, ("llama_cpp", 0): 1, ("llama_cpp", 1): 1, ("none", 0): 2, ("none", 1): 2
    }  # fmt: skip


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("EVOPRESS_CACHE", str(tmp_path / "cache"))
    return workspace_of(tmp_path, ["+debug=tiny", "scale.calibration_tokens=256"])


def test_importance_is_the_mean_square_of_what_columns_meet(workspace: Any) -> None:
    found, tokens = importance_of(workspace), workspace.calibration_tokens
    model, seen = workspace.pretrained.model, {}
    name = "model.layers.1.mlp.down_proj"
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, inputs: seen.update({name: inputs[0]}))
    model(input_ids=tokens, use_cache=False)
    hook.remove()
    assert len(found) == 14 and set(found) >= {"blk.0.attn_q.weight", "blk.1.ffn_down.weight"}
    assert np.allclose(found["blk.1.ffn_down.weight"], seen[name].square().mean((0, 1)).numpy(), rtol=1e-3)


@pytest.mark.engine
@pytest.mark.skipif(not llama_cpp.is_there(), reason="llama.cpp is not installed: pip install -e '.[llama_cpp]'")
def test_llama_cpp_makes_its_own_mix_by_an_importance_matrix(workspace: Any, tmp_path: Path) -> None:
    dense_file(workspace, tmp_path / "dense.gguf")
    importance = importance_of(workspace)
    np.savez(tmp_path / "importance.npz", **importance)
    script = (
        "import sys, numpy\nfrom pathlib import Path\nfrom experiments.exports.llama_cpp import quantize\n"
        "folder = Path(sys.argv[1])\n"
        "quantize(folder / 'dense.gguf', folder / 'plain.gguf', 'Q4_0')\n"
        "quantize(folder / 'dense.gguf', folder / 'weighted.gguf', 'Q4_0', dict(numpy.load(folder / 'importance.npz')))\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True, timeout=120)
    assert "Q4_0" in row_of("plain", tmp_path / "plain.gguf")["matrices"]  # type: ignore[operator]
    assert (tmp_path / "plain.gguf").read_bytes() != (tmp_path / "weighted.gguf").read_bytes()
    command = [sys.executable, "-m", "experiments.exports.engines", str(tmp_path / "weighted.gguf"), "llama.cpp", "1"]
    told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)
    assert told["generated_tokens_per_second"] > 0 and told["peak_memory_mb"] > 1


def test_engines_are_known_by_what_lies_there(tmp_path: Path) -> None:
    for name, config in (("MLX", {"quantization": {}}), ("transformers", {}), ("compressed-tensors", {})):
        (tmp_path / name).mkdir()
        packed = {"quantization_config": {"quant_method": name}} if name == "compressed-tensors" else {}
        (tmp_path / name / "config.json").write_text(json.dumps({**config, **packed}))
        assert engine_of(tmp_path / name) == name
    (tmp_path / "MLX" / "model.safetensors").write_bytes(b"abc")
    assert engine_of(tmp_path / "a.gguf") == "llama.cpp" and bytes_of(tmp_path / "MLX") == 3
    file = tmp_path / "a.gguf"
    file.touch()
    assert [each[0::2] for each in run.named([f"{file}", f"x@transformers bfloat16={tmp_path}"])] == [
        ("a", "llama.cpp"),
        ("x", "transformers bfloat16"),
    ]
