import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from evopress.compress.sparse import Sparse
from evopress.levels.codec import CODECS

CODEC = CODECS["bit_mask"]
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    share=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    dtype=st.sampled_from(list(BITS)),
    seed=st.integers(0, 2**31 - 1),
)
def test_any_bits_come_back(rows, columns, share, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    pattern = torch.randint(-(2**15), 2**15, (rows, columns), generator=generator)
    W = (pattern * (65537 if dtype == torch.float32 else 1)).to(BITS[dtype]).view(dtype)  # NaN, infinities, -0 and all
    mask = torch.rand(rows, columns, generator=generator) < share
    payload = Sparse.of(W, mask, dtype)
    back = CODEC.decode(*CODEC.encode(payload))
    assert torch.equal(back.mask, mask)
    decoded = back.decode()
    assert decoded.dtype == dtype
    assert torch.equal(decoded.view(BITS[dtype]), torch.where(mask, W.view(BITS[dtype]), 0))
    assert torch.equal(decoded.view(BITS[dtype]), payload.decode().view(BITS[dtype]))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_file_holds_a_bit_per_weight_and_the_kept_values(tmp_path, share):
    W = torch.randn(16, 24, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    mask = torch.rand(16, 24, generator=torch.Generator().manual_seed(1)) < share
    tensors, meta = CODEC.encode(Sparse.of(W, mask, W.dtype))
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == 16 * 24 // 8 + 2 * int(mask.sum())
    save_file(tensors, tmp_path / "w.safetensors")
    decoded = CODEC.decode(load_file(tmp_path / "w.safetensors"), meta).decode()
    assert torch.equal(decoded, torch.where(mask, W, 0))
