"""What a GPU does with the parts of an 8B model's database and search: each fast path beside its plain one, on one random block.

    python -m experiments.benchmark.gpu                  # Llama-3-8B's shape on a CUDA device: about a minute
    python -m experiments.benchmark.gpu --size smoke     # the same steps on a small shape, on any device, to see that they run

Prints a table and writes `results/gpu/<device>.csv`: seconds of one block, launches and rates, and what they come to for 32 blocks.
"""

from __future__ import annotations

import argparse
import gc
import platform
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from evopress.compress import columns
from evopress.compress.gptq import GPTQ
from evopress.compress.hessian import HessianSum, add_product
from evopress.fitness.measures import KLDivergence
from evopress.fitness.population import measure_sums
from evopress.levels.calibration import collect_hessians, propagate
from evopress.levels.codec import pack_bits
from evopress.machine import exact_products
from evopress.models.blocks import BlockModel
from experiments.benchmark.forward import GivenStates
from experiments.benchmark.sizes import Shape
from experiments.benchmark.subject import make_blocks
from experiments.frames import write_frame
from experiments.scripts import in_one_sentence

RESULTS = Path(__file__).parent / "results" / "gpu"
SIZES = {
    "llama_8b": (Shape(4096, 14336, 1, 32, 8, 128256), 4096, 16),
    "smoke": (Shape(64, 128, 1, 4, 2, 512), 32, 4),
}
"""A name to the shape of a block and its head, tokens of a sequence, and calibration sequences."""
BLOCKS = 32
PAPER_TOKENS = 8192 * 1024
"""Calibration tokens at the paper's size."""


def waited(device: torch.device) -> float:
    """Return the time when the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(work: Callable[[], Any], device: torch.device, *, warm: bool = True, repeats: int = 1) -> float:
    """Return the least time that some work takes."""
    if warm:
        work()
    found = []
    for _ in range(repeats):
        started = waited(device)
        work()
        found.append(waited(device) - started)
    return min(found)


def activations(blocks: BlockModel, tokens: Tensor, length: int, per_paper: float) -> Iterator[dict[str, Any]]:
    """A block's walk: activations on the device, in pinned and in pageable host memory; with the last product and without."""
    device, shape = blocks.device, (len(tokens), length, blocks.hidden_size)
    batch = max(16384 // length, 1)
    hidden = torch.randn(shape, device=device, dtype=torch.float32).to(blocks.dtype)
    places = {"device": hidden, "pinned": hidden.cpu(), "pageable": hidden.cpu()}
    if device.type == "cuda":
        places["pinned"] = places["pinned"].pin_memory()
    count = hidden.shape[0] * length
    for name, buffer in places.items():
        took = seconds(partial(propagate, blocks, 0, buffer, batch, {}), device)
        yield {"part": "a block's forward over calibration text", "way": name, "seconds": took, "paper": took * per_paper * BLOCKS}
    flops = 2 * sum(p.numel() for p in blocks.blocks[0].parameters()) * count + 2 * length * count * blocks.hidden_size
    rate = flops / seconds(lambda: propagate(blocks, 0, hidden, batch, {}), device)
    yield {"part": "products of that forward, TFLOP/s", "way": "device", "seconds": rate / 1e12}

    kept = hidden.clone()
    for name, advance in (("to its last input", False), ("to its end", True)):
        took = seconds(partial(collect_hessians, blocks, 0, hidden, batch, advance=advance), device)
        hidden.copy_(kept)
        yield {"part": "a block's Hessians", "way": name, "seconds": took, "paper": took * per_paper * BLOCKS}
    X = torch.randn(16384, 4 * blocks.hidden_size if device.type == "cuda" else 64, device=device).to(blocks.dtype)

    def sums() -> None:
        HessianSum(X.shape[1], device=device).add(X.unsqueeze(0))

    def one_product() -> None:
        add_product(torch.zeros(X.shape[1], X.shape[1], device=device), X, X)

    yield {"part": f"H of {X.shape[1]:,} columns", "way": "in panels", "seconds": seconds(sums, device)}
    yield {"part": f"H of {X.shape[1]:,} columns", "way": "one product", "seconds": seconds(one_product, device)}


def sweeps(blocks: BlockModel, hessians: dict[str, Tensor], owners: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The sweeps of a block, at 256 MiB and as much as there is, with Triton and without; packing, on the host and the device."""
    device, linears = blocks.device, blocks.linears(0)
    gptq = GPTQ(bits=(6, 5, 4, 3, 2), group_size=128 if blocks.hidden_size >= 128 else 16)
    made: dict[str, Any] = {}

    def compress(recipe: str, slice_bytes: int | None) -> None:
        one = GPTQ(bits=gptq.bits, group_size=gptq.group_size, recipe=recipe, slice_bytes=slice_bytes)
        for owner, H in hessians.items():
            made.update(one.compress({n: linears[n].weight for n in linears if owners[n] == owner}, H))

    kernels, in_torch = columns._kernels, lambda device: None
    for recipe, slice_bytes, way, name in (
        ("paper", None, kernels, "free memory"),
        ("paper", 2**28, kernels, "256 MiB"),
        ("paper", None, in_torch, "free memory, without Triton"),
        ("best", None, kernels, "free memory"),
        ("best", None, in_torch, "free memory, without Triton"),
    ):
        with patch.object(columns, "_kernels", way):
            took = seconds(partial(compress, recipe, slice_bytes), device, warm=way is kernels)
        yield {"part": f"sweeps of a block, recipe={recipe}", "way": name, "seconds": took, "paper": took * BLOCKS}
    payloads = [level.payload for levels in made.values() for level in levels]
    packed = {}
    for name, place in (("device", device), ("host", torch.device("cpu"))):

        def pack(name: str = name, place: torch.device = place) -> None:
            packed[name] = [pack_bits(p.codes.to(place), p.bits) for p in payloads]

        took = seconds(pack, device, warm=False)
        yield {"part": "packing a block's codes", "way": name, "seconds": took, "paper": took * BLOCKS}
    assert all(torch.equal(a, b) for a, b in zip(packed["device"], packed["host"], strict=True)), "packed differently"


def divergence(blocks: BlockModel, length: int) -> Iterator[dict[str, Any]]:
    """KL divergences of four candidates in chunks; the sum over the vocabulary in three ways."""
    device, head = blocks.device, blocks.head()
    states = [torch.randn(2, length, blocks.hidden_size, device=device).to(blocks.dtype) for _ in range(5)]
    ids = torch.zeros(2, length, dtype=torch.int64)
    evaluator: Any = GivenStates(blocks, states[:4])
    for chunk in (256, 1024, 4096):
        took = seconds(partial(measure_sums, evaluator, [None] * 4, ids, states[4], KLDivergence(), chunk_tokens=chunk), device)
        yield {"part": "KL of four candidates, tokens/s", "way": f"chunks of {chunk}", "seconds": 4 * 2 * length / took}
    p = torch.softmax(head.logits(states[0].reshape(-1, blocks.hidden_size)[:1024]), dim=-1)
    values = p.log()
    ways: dict[str, Callable[[], Tensor]] = {
        "batched product": lambda: torch.bmm(p.unsqueeze(1), values.unsqueeze(2)).reshape(-1),
        "product and sum": lambda: (p * values).sum(-1),
        "vecdot": lambda: torch.linalg.vecdot(p, values),
    }
    for name, way in ways.items():
        yield {"part": "expectation over the vocabulary, 1,024 tokens", "way": name, "seconds": seconds(way, device, repeats=5)}


def products(device: torch.device, width: int) -> Iterator[dict[str, Any]]:
    """The rate of bare products, which the rest is compared with."""
    A = torch.randn(width, width, device=device).to(torch.bfloat16)
    took = seconds(lambda: A @ A, device, repeats=5)
    yield {"part": f"bare product of {width:,}, bfloat16, TFLOP/s", "way": "", "seconds": 2 * width**3 / took / 1e12}
    B = A.float()
    took = seconds(lambda: B @ B, device, repeats=3)
    yield {"part": f"bare product of {width:,}, float32, TFLOP/s", "way": "", "seconds": 2 * width**3 / took / 1e12}


@in_one_sentence()
def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="llama_8b", choices=list(SIZES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and asked.size != "smoke":
        parser.error(f"--size {asked.size} needs a CUDA device: --size smoke runs anywhere")
    exact_products()
    shape, length, sequences = SIZES[asked.size]
    with torch.no_grad():
        blocks = make_blocks(shape, dtype="bfloat16" if device.type == "cuda" else "float32", device=device)
        tokens = torch.zeros(sequences, length, dtype=torch.int64)
        per_paper = PAPER_TOKENS / (sequences * length)
        rows = list(products(device, 8192 if device.type == "cuda" else 256))
        rows += activations(blocks, tokens, length, per_paper)
        hidden = torch.randn(sequences, length, blocks.hidden_size, device=device).to(blocks.dtype)
        found = collect_hessians(blocks, 0, hidden, max(16384 // length, 1))
        del hidden
        gc.collect()
        rows += sweeps(blocks, dict(found.hessians), dict(found.owners))
        rows += divergence(blocks, length)
    import pandas as pd  # not on every machine that only measures

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    table = pd.DataFrame(rows).assign(device=name)
    if device.type == "cuda":
        table.loc[len(table)] = {
            "part": "peak of device memory, GB",
            "way": "",
            "seconds": torch.cuda.max_memory_allocated(device) / 1e9,
            "device": name,
        }
    table = table.rename(columns={"seconds": "measured", "paper": "32 blocks at the paper's size, s"})
    print(table.drop(columns="device").to_string(index=False, na_rep="", float_format="%.4g"))
    asked.out.mkdir(parents=True, exist_ok=True)
    write_frame(asked.out / f"{name.replace(' ', '_').lower()}.csv", table, digits="%.5g")


if __name__ == "__main__":
    main()
