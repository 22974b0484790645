"""Special tokens that a model was trained with: what its tokenizer puts before a text, and ids that its embedding lacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from evopress.errors import EvoPressError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLAIN_TEXT = "A plain text."


def leading_ids(tokenizer: PreTrainedTokenizerBase, rule: str = "auto") -> tuple[int, ...]:
    """Return the ids that every sequence begins with: usually the beginning of text (BOS) or nothing.

    Gemma's perplexity on windows without its BOS is more than twice that of windows with it, so a model is measured as its
    tokenizer serves it.

    Args: rule: auto: what the tokenizer puts before a plain text; true: that, or its BOS where it puts nothing; false: nothing.

    Raises: EvoPressError for "true" and a tokenizer without BOS.
    """
    if rule == "false":
        return ()
    added = _added_before(tokenizer)
    if added or rule == "auto":
        return added
    if tokenizer.bos_token_id is None:
        raise EvoPressError("model.bos=true but this tokenizer has no beginning-of-text token: use model.bos=auto or false")
    return (int(tokenizer.bos_token_id),)


def _added_before(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    whole = list(tokenizer(_PLAIN_TEXT)["input_ids"])
    plain = list(tokenizer(_PLAIN_TEXT, add_special_tokens=False)["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start])
    return ()


def ids_beyond(tokenizer: PreTrainedTokenizerBase, num_rows: int) -> dict[int, str]:
    """Return the tokenizer's tokens, by id, that an embedding of so many rows lacks; ordinary tokenizers have none or a few."""
    return {i: token for token, i in tokenizer.get_vocab().items() if i >= num_rows}


def check_embedded(
    sequences: Tensor, tokenizer: PreTrainedTokenizerBase, *, num_rows: int, what: str, separator: str | None
) -> None:
    """Raise EvoPressError if token ids int64 [N, L] have one that an embedding of `num_rows` rows lacks.

    Args:
        what: the text: "the search text".
        separator: the setting of the token between documents.
    """
    highest = int(sequences.max())
    if highest < num_rows:
        return
    token, way_out = not_embedded(tokenizer, highest, num_rows=num_rows), "resize the model's embedding or mend its tokenizer"
    if highest >= len(tokenizer):
        way_out = "give ids that this tokenizer makes"
    elif highest == tokenizer.eos_token_id or tokenizer.convert_ids_to_tokens(highest) == separator:
        way_out = "if it only joins documents, leave it out by model.separator=null, else resize the model's embedding"
    raise EvoPressError(f"{what} has {token}: {way_out}")


def not_embedded(tokenizer: PreTrainedTokenizerBase, token_id: int, *, num_rows: int) -> str:
    """Say which token an embedding lacks."""
    token = f"the token id {token_id}, which the tokenizer has not"
    if token_id < len(tokenizer):
        token = f"the token {tokenizer.convert_ids_to_tokens(token_id)!r} (id {token_id})"
    return f"{token}, but the model's embedding has {num_rows} rows"
