"""What of an engine's rules a model breaks, in one sentence."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from itertools import chain
from typing import Any

from evopress.engines import Engine
from evopress.errors import EvoPressError
from evopress.export.exporter import DENSE, GGUF_TYPE, INTEGERS, OF_EXPERT, SPARSE, Form


def refuse_unfit(engine: Engine, forms: Iterable[Form], *, asked: str, otherwise: str) -> None:
    """Raise EvoPressError if an engine cannot run one of these forms, or weights that it runs as one may differ.

    Args:
        forms: of every unit at its level, or at each level that it may get.
        asked: the setting that asks for the engine: "export=[mlx]".
        otherwise: what to do if the rule is not to be kept: "use export=[dequantized]".
    """
    tied: dict[tuple[str, str], dict[str, list[Form]]] = {}
    for form in forms:
        if form.kind == OF_EXPERT:
            raise EvoPressError(f"{asked} is not written for models whose experts are dropped ({form}): {otherwise}")
        if form.kind == SPARSE:
            raise EvoPressError(f"{asked} cannot hold sparse weights ({form}): {otherwise}")
        if form.kind == INTEGERS and engine.gguf_types:
            raise EvoPressError(
                f"{asked} cannot hold {form}: {engine.title} computes with GGUF types only; use +method=gguf, or {otherwise}"
            )
        if form.kind == GGUF_TYPE and not engine.gguf_types:
            raise EvoPressError(f"{asked} cannot hold GGUF's types ({form}): set method.grid=integers, or use export=[gguf]")
        if form.kind == INTEGERS:
            _refuse_integers(engine, form, asked=asked, otherwise=otherwise)
        module, _, kind = form.unit.rpartition(".")
        if form.kind in (INTEGERS, DENSE) and (name := next((n for n, kinds in engine.ties.items() if kind in kinds), None)):
            tied.setdefault((module, name), {}).setdefault(form.unit, []).append(form)
    for (_, name), members in tied.items():
        _refuse_untied(engine, name, list(members.values()), asked=asked, otherwise=otherwise)
        if engine.tied_in_words:
            _refuse_parts_of_words(engine, name, chain.from_iterable(members.values()), asked=asked, otherwise=otherwise)


def refuse_experts(forms: Iterable[Form], *, asked: str, otherwise: str = "use export=[dequantized]") -> None:
    """Raise EvoPressError if one of these forms is an expert's weight, for formats that are not written for those."""
    if (form := next((form for form in forms if form.of_expert), None)) is not None:
        raise EvoPressError(f"{asked} is not written for experts ({form}): {otherwise}")


def refuse_model_types(config: Mapping[str, Any], model_types: Collection[str], *, asked: str, why: str) -> None:
    """Raise EvoPressError if a model is of one of these types.

    Args: why: the program does not read its file.
    """
    if (model_type := config.get("model_type")) in model_types:
        raise EvoPressError(f"{asked} cannot hold a model of type {model_type}: {why}; use export=[dequantized]")


def refuse_head_size(config: Mapping[str, Any], model_types: Collection[str], *, asked: str, program: str) -> None:
    """Raise EvoPressError if a model of these types says how large its heads are, otherwise than a program takes them to be.

    Args: model_types: those whose heads the program has divide the model's width among them.
    """
    if (head_size := config.get("head_dim")) is None or config["model_type"] not in model_types:
        return
    if head_size * config["num_attention_heads"] != config["hidden_size"]:
        raise EvoPressError(
            f"{asked} cannot hold a {config['model_type']} with head_dim={head_size}, where {program} takes "
            f"hidden_size / num_attention_heads = {config['hidden_size']} / {config['num_attention_heads']}: use "
            "export=[dequantized]"
        )


def window_left_out(config: Mapping[str, Any], model_types: Collection[str]) -> int | None:
    """Return the tokens of a sliding window that a text can be longer than, where a program knows none; None: there is none.

    Args: model_types: those that have sliding windows in transformers and none in the program.
    """
    window, layer_types = config.get("sliding_window"), config.get("layer_types")
    slides = config.get("model_type") in model_types and isinstance(window, int)
    if not slides or (layer_types is not None and "sliding_attention" not in layer_types):
        return None
    return window if window < config.get("max_position_embeddings", math.inf) else None


def about_windows(config: Mapping[str, Any], model_types: Collection[str], *, program: str) -> str:
    """Return what log and card say of a sliding window that a program does not know, nothing where there is none."""
    if (window := window_left_out(config, model_types)) is None:
        return ""
    return (
        f" {program} knows no sliding window of a {config['model_type']}: on texts of more than {window} tokens it computes "
        "something else."
    )


def _refuse_integers(engine: Engine, form: Form, *, asked: str, otherwise: str) -> None:
    if form.bits not in engine.bits:
        raise EvoPressError(
            f"{asked} cannot hold {form}: {engine.title} has {', '.join(map(str, engine.bits))} bits; leave {form.bits} out of "
            f"method.levels, or {otherwise}"
        )
    if form.outside and not engine.outside:
        raise EvoPressError(
            f"{asked} cannot hold {form}: {engine.title} has no integers outside the blocks; set method.include=[blocks], or "
            f"{otherwise}"
        )
    if form.group_size not in engine.groups and not (engine.whole_rows and form.group_size == form.columns):
        rows = ", or whole rows" if engine.whole_rows else ""
        raise EvoPressError(
            f"{asked} cannot hold {form}: {engine.title} has groups of {', '.join(map(str, engine.groups))}{rows}; set "
            f"method.group_size to one of them, or {otherwise}"
        )
    if form.scale_dtype not in engine.scale_dtypes:
        known = " or ".join(engine.scale_dtypes)
        raise EvoPressError(
            f"{asked} cannot hold {form}, whose scales are {form.scale_dtype}: {engine.title} has {known}; set method.scale_dtype "
            f"to it, or {otherwise}"
        )
    if engine.rows_in_words and (form.rows % 32 or form.columns % 32):
        raise EvoPressError(
            f"{asked} cannot hold {form}, which is [{form.rows}, {form.columns}]: {engine.title} packs integers in 32-bit "
            f"words, so both must be multiples of 32; {otherwise}"
        )


def _refuse_untied(engine: Engine, name: str, members: list[list[Form]], *, asked: str, otherwise: str) -> None:
    """Refuse weights that run as one and have, or may get, different levels."""
    schemes = {(form.kind, form.bits, form.group_size, form.symmetric) for forms in members for form in forms}
    ties = {form.tied for forms in members for form in forms}
    if len(schemes) == 1 or (len(ties) == 1 and ties != {""}):
        return
    kinds = [forms[0].unit.rpartition(".")[2] for forms in members]
    alone = all(len(forms) == 1 for forms in members)
    if alone:
        first = members[0][0]
        other = next(forms[0] for forms in members if (forms[0].kind, forms[0].bits) != (first.kind, first.bits))
        what = f"{first} beside {other}"
    else:
        what = f"{members[0][0].unit} and {', '.join(kinds[1:])} at levels of their own"
    raise EvoPressError(
        f"{asked} cannot hold {what}: {engine.title} fuses {', '.join(kinds)} into {name}, with the bits of the first; "
        f"search with engine={engine.name}, which gives them one level, or {otherwise}"
    )


def _refuse_parts_of_words(engine: Engine, name: str, forms: Iterable[Form], *, asked: str, otherwise: str) -> None:
    """Refuse weights that run as one where the zeros of one do not fill words.

    Source: vLLM 0.32 and 0.33, `_adjust_shard_indexes_for_packing`: a part has rows * bits / 32 words, rounded down.
    """
    if (form := next((form for form in forms if form.rows * form.bits % 32), None)) is None:
        return
    fit = ", ".join(str(bits) for bits in engine.bits if form.rows * bits % 32 == 0)
    raise EvoPressError(
        f"{asked} cannot hold {form}, which has {form.rows} rows: {engine.title} fuses {', '.join(engine.ties[name])} into {name} "
        "and cuts off what of each one's zeros does not fill 32-bit words, so rows times bits must be a multiple of 32; "
        + (f"set method.levels to some of {fit} bits, or {otherwise}" if fit else otherwise)
    )
