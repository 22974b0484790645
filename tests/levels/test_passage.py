"""Batches on their way: what is skipped is what nobody needs, and a GPU's overlapped copies are the plain ones."""

from types import SimpleNamespace

import pytest
import torch

from evopress.levels import passage
from evopress.levels.calibration import collect_hessians
from evopress.levels.codec import pack_bits, pack_words
from evopress.levels.passage import Passage, room_for_activations


def test_the_forward_ends_with_the_last_input_and_gives_the_same_hessians(tiny_blocks, tokens):
    blocks = tiny_blocks("llama")
    hidden = blocks.embed(tokens(6, 16))
    blocks.prepare(16)
    products = []
    down = blocks.blocks[0].mlp.down_proj
    handle = down.register_forward_hook(lambda *_: products.append(1))
    found = collect_hessians(blocks, 0, hidden, 2)
    assert len(products) == 1  # the first batch tells which input is the last
    whole = collect_hessians(blocks, 0, hidden.clone(), 2, advance=True)
    handle.remove()
    assert len(products) == 1 + 3
    assert found.owners == whole.owners
    assert all(torch.equal(found.hessians[name], H) for name, H in whole.hessians.items())


@pytest.mark.parametrize("bits", range(1, 9))
def test_words_are_packed_to_the_same_bytes(bits):
    codes = torch.randint(2**bits, (7, 13), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    assert torch.equal(pack_words(codes, bits), pack_bits(codes, bits))


def test_on_a_cpu_activations_lie_in_memory_and_are_put_in_place():
    buffer = room_for_activations((5, 2, 3), torch.float32, torch.device("cpu"))
    buffer.zero_()
    passage = Passage(buffer, 2, torch.device("cpu"))
    for start, hidden in passage:
        passage.put(start, hidden + start)
    assert buffer[:, 0, 0].tolist() == [0, 0, 2, 2, 4]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_overlapped_copies_are_the_plain_ones():
    device = torch.device("cuda")
    plain = torch.randn(37, 64, 256, generator=torch.Generator().manual_seed(0))
    pinned = plain.clone().pin_memory()
    for buffer in (plain, pinned):
        for _ in range(3):
            passage = Passage(buffer, 4, device)
            for start, hidden in passage:
                for _ in range(20):
                    hidden = torch.sin(hidden) + hidden.flip(-1)
                passage.put(start, hidden)
    assert torch.equal(plain, pinned)
    codes = torch.randint(8, (100, 77), dtype=torch.uint8)
    assert torch.equal(pack_bits(codes.to(device), 3), pack_bits(codes, 3))


@pytest.mark.parametrize(
    ("size", "kind", "available", "held"),
    [
        (5 * 2**30, "cuda", 100 * 2**30, 8 * 2**30),
        (8 * 2**30, "cuda", 100 * 2**30, 8 * 2**30),
        (5 * 2**30, "cuda", 9 * 2**30, 5 * 2**30),
        (5 * 2**30, "cpu", 100 * 2**30, 5 * 2**30),
    ],
)
def test_pinned_memory_is_counted_as_torch_takes_it(size, kind, available, held, monkeypatch):
    monkeypatch.setattr(passage.psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
    assert passage.held_on_host(size, torch.device(kind)) == held
