import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evopress.compress.gguf_levels import GGUFWeight
from evopress.compress.gguf_types import GGUF_TYPES
from evopress.compress.gptq import GPTQ, Dense, Quantized
from evopress.compress.sparse import Sparse
from evopress.levels.codec import CODECS, Packed, pack_bits, unpack_bits


def packed_literally(codes: list[int], bits: int) -> list[int]:
    """Lay the codes' bits down one after the other, least significant first, and cut them into bytes."""
    stream = [code >> i & 1 for code in codes for i in range(bits)]
    stream += [0] * (-len(stream) % 8)
    return [sum(bit << i for i, bit in enumerate(stream[start : start + 8])) for start in range(0, len(stream), 8)]


@given(bits=st.integers(1, 8), count=st.integers(0, 75), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_packing_is_exact_and_takes_no_more_than_the_bits(bits, count, seed):
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**bits, count, dtype=np.uint8))
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == packed_literally(codes.tolist(), bits)
    assert torch.equal(unpack_bits(packed, bits, count), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_extreme_codes_and_shapes_survive(bits):
    for codes in (torch.full((3, 7), 2**bits - 1), torch.zeros(5, 1), torch.arange(33).remainder(2**bits).reshape(3, 11)):
        codes = codes.to(torch.uint8)
        assert torch.equal(unpack_bits(pack_bits(codes, bits), bits, codes.numel()).reshape(codes.shape), codes)
    transposed = torch.arange(12).remainder(2**bits).to(torch.uint8).reshape(3, 4).T
    assert torch.equal(unpack_bits(pack_bits(transposed, bits), bits, 12).reshape(4, 3), transposed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("rows", "columns", "group_size"), [(5, 24, 8), (3, 15, 5), (7, 9, None)])
def test_a_payload_comes_back_bit_for_bit(dtype, scale_dtype, rows, columns, group_size):
    W = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    gptq = GPTQ(bits=(8, 7, 6, 5, 4, 3, 2, 1), group_size=group_size, scale_dtype=scale_dtype)
    for result in gptq.compress({"w": W}, torch.eye(columns))["w"]:
        payload = result.payload
        assert isinstance(payload, Quantized)
        tensors, meta = CODECS[payload.codec].encode(payload)
        again = CODECS[payload.codec].decode(tensors, meta)
        assert again.decode().dtype == dtype
        assert torch.equal(again.decode(), payload.decode())
        assert tensors["codes"].numel() == -(-rows * columns * payload.bits // 8)


def test_between_processes_payloads_are_as_small_as_in_files():
    W = torch.randn(6, 256, generator=torch.Generator().manual_seed(0))
    (quantized,) = GPTQ(bits=(3,), group_size=64).compress({"w": W}, torch.eye(256))["w"]
    gguf = GGUFWeight(torch.arange(6 * GGUF_TYPES["Q4_0"].row_bytes(256), dtype=torch.uint8).reshape(6, -1), "Q4_0", torch.float32)
    for payload in (quantized.payload, Sparse(mask=W > 0, values=W[W > 0]), Dense(W), gguf):
        sent = pickle.dumps(Packed(payload))
        found = pickle.loads(sent).payload
        assert type(found) is type(payload) and vars(found).keys() == vars(payload).keys()
        for name, value in vars(payload).items():
            same = torch.equal(vars(found)[name], value) if isinstance(value, torch.Tensor) else vars(found)[name] == value
            assert same, name
    assert len(pickle.dumps(Packed(quantized.payload))) < W.numel() * 3 / 8 + 1500
