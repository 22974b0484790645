import pytest
import torch
from safetensors.torch import load_file

from evopress.models.tiny import VOCABULARY, byte_tokenizer, ensure_tiny, make_tiny


def test_the_tokenizer_gives_one_token_per_byte_and_gives_the_text_back():
    tokenizer = byte_tokenizer()
    for text in ("plain words\n", "ünï© 你好 🙂\t", "  spaces  "):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(text.encode())
        assert min(ids) > 0 and max(ids) < VOCABULARY
        assert tokenizer.decode(ids) == text


def test_weights_depend_on_the_arguments_alone(tmp_path):
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = make_tiny(tmp_path / "a", num_blocks=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    second = make_tiny(tmp_path / "b", num_blocks=1)
    other = make_tiny(tmp_path / "c", num_blocks=1, seed=1)
    weights = [load_file(folder / "model.safetensors") for folder in (first, second, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_a_folder_is_made_once_and_nothing_else_is_left(tmp_path):
    folder = ensure_tiny(tmp_path)
    changed = (folder / "model.safetensors").stat().st_mtime_ns
    assert ensure_tiny(tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == changed
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_cache_is_as_readable_for_others_as_the_user_lets_new_files_be(tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "file").touch()
    folder = make_tiny(tmp_path / "model")
    assert folder.stat().st_mode == plain.stat().st_mode
    assert {path.stat().st_mode for path in folder.iterdir()} == {(plain / "file").stat().st_mode}


def test_a_failed_writing_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("evopress.models.tiny.byte_tokenizer", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_tiny(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
