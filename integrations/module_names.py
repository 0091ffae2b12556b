"""What Hugging Face models call the modules that a plan's layers are, and stages as places of such modules."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from lp_plugin.errors import PartitionFormatError
from lp_plugin.exchange.counts import NamedLayer, block_starts, shown

__all__ = ["ModuleNames", "Unit", "boundaries_from_places", "check_names", "module_names", "units_of"]

_LONGEST_NAME = 200
"""Characters; names of modules are far shorter, and longer ones cost time for every dot in them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleNames:
    """Names in transformers' model of a family: a causal language model, or an encoder that fills in masked tokens."""

    embedding: tuple[str, ...] = ("model.embed_tokens",)
    """Tables of tokens and positions, and what follows them before the first block."""
    blocks: str = "model.layers"
    """The list of blocks."""
    norm: tuple[str, ...] = ("model.norm",)
    """The final norm."""
    head: tuple[str, ...] = ("lm_head",)
    """The projection to the vocabulary, and what precedes it after the final norm."""
    optional: tuple[str, ...] = ()
    """Those of them that only some models of the family have; they are written, and need not be read."""
    weightless: tuple[str, ...] = ()
    """Modules without parameters that stand beside them; they go with the first stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Layers that are one module of the model, or several that belong together."""

    start: int
    """First layer."""
    stop: int
    """One past the last layer: a block cut into halves is two."""
    modules: tuple[str, ...]
    """Fully qualified names."""


_GPT2 = ModuleNames(
    embedding=("transformer.wte", "transformer.wpe"),
    blocks="transformer.h",
    norm=("transformer.ln_f",),
    weightless=("transformer.drop",),
)
_GPTJ = ModuleNames(
    embedding=("transformer.wte",),
    blocks="transformer.h",
    norm=("transformer.ln_f",),
    weightless=("transformer.drop",),
)
_ROBERTA = ModuleNames(embedding=("roberta.embeddings",), blocks="roberta.encoder.layer", norm=())
_LLAMA = ModuleNames(weightless=("model.rotary_emb",))
_FAMILIES: Mapping[str, ModuleNames] = {
    "bert": ModuleNames(embedding=("bert.embeddings",), blocks="bert.encoder.layer", norm=(), head=("cls",)),
    "bloom": ModuleNames(
        embedding=("transformer.word_embeddings", "transformer.word_embeddings_layernorm"),
        blocks="transformer.h",
        norm=("transformer.ln_f",),
    ),
    "camembert": _ROBERTA,
    "codegen": _GPTJ,
    "distilbert": ModuleNames(
        embedding=("distilbert.embeddings",),
        blocks="distilbert.transformer.layer",
        norm=(),
        head=("vocab_transform", "vocab_layer_norm", "vocab_projector"),
    ),
    "electra": ModuleNames(
        embedding=("electra.embeddings", "electra.embeddings_project"),
        blocks="electra.encoder.layer",
        norm=(),
        head=("generator_predictions", "generator_lm_head"),
        optional=("electra.embeddings_project",),
    ),
    "falcon": ModuleNames(
        embedding=("transformer.word_embeddings",),
        blocks="transformer.h",
        norm=("transformer.ln_f",),
        weightless=("transformer.rotary_emb",),
    ),
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neo": _GPT2,
    "gpt_neox": ModuleNames(
        embedding=("gpt_neox.embed_in",),
        blocks="gpt_neox.layers",
        norm=("gpt_neox.final_layer_norm",),
        weightless=("gpt_neox.emb_dropout", "gpt_neox.rotary_emb"),
    ),
    "gptj": _GPTJ,
    "modernbert": ModuleNames(
        embedding=("model.embeddings",),
        norm=("model.final_norm",),
        head=("head", "decoder"),
        weightless=("model.rotary_emb",),
    ),
    "mpt": ModuleNames(embedding=("transformer.wte",), blocks="transformer.blocks", norm=("transformer.norm_f",)),
    "opt": ModuleNames(
        embedding=("model.decoder.embed_tokens", "model.decoder.embed_positions", "model.decoder.project_in"),
        blocks="model.decoder.layers",
        norm=("model.decoder.final_layer_norm",),
        head=("model.decoder.project_out", "lm_head"),
        optional=("model.decoder.project_in", "model.decoder.project_out"),
    ),
    "phi": ModuleNames(norm=("model.final_layernorm",), weightless=("model.rotary_emb", "model.embed_dropout")),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
}
"""transformers' ``model_type`` -> names, for the families that differ from llama's."""


def module_names(model_type: str | None) -> ModuleNames:
    """Names in models of a family; those of llama, which most families share, unless the family has its own.

    Args:
        model_type: ``"model_type"`` of the model's ``config.json``.

    Raises:
        PartitionFormatError: If no family was given.
    """
    if model_type is None:
        raise PartitionFormatError(
            'the format names the model\'s modules, which depend on the family; give the model type ("model_type" in '
            "the model's config.json)."
        )
    return _FAMILIES.get(model_type, _LLAMA)


def units_of(layers: Sequence[NamedLayer], model_type: str | None) -> list[Unit]:
    """The modules of all layers, in model order.

    Args:
        layers: Embedding, blocks or their halves, norm, head.
        model_type: The model's family.

    Raises:
        PartitionFormatError: If a layer is of a kind that has no name here.
    """
    names = module_names(model_type)
    starts = block_starts(layers)
    before, after = {"embedding": names.embedding}, {"norm": names.norm, "head": names.head}
    units = []
    for start, stop in itertools.pairwise([*range(starts[0]), *starts, *range(starts[-1] + 1, len(layers) + 1)]):
        layer = layers[start]
        if layer.block is not None:
            modules: tuple[str, ...] | None = (f"{names.blocks}.{layer.block}",)
        else:
            modules = (before if start < starts[0] else after).pop(layer.kind, None)
        if modules is None:
            raise PartitionFormatError(
                f"there is no module name for layer {layer.name!r} of kind {layer.kind!r}: names are known of one "
                "embedding before the blocks, and of one norm and one head after them. Use the format 'deepspeed', "
                "which numbers all layers."
            )
        units.append(Unit(start=start, stop=stop, modules=modules))
    return units


def check_names(layers: Sequence[NamedLayer], model_type: str | None) -> None:
    """Refuses a model whose layers have no module names here.

    Raises:
        PartitionFormatError: Saying which layer.
    """
    units_of(layers, model_type)


def boundaries_from_places(
    places: Mapping[str, Hashable], layers: Sequence[NamedLayer], model_type: str | None
) -> tuple[tuple[int, ...], tuple[Hashable, ...]]:
    """Boundaries of modules that were put in places.

    Args:
        places: Module name -> device or stage. A name covers the modules inside it, as in accelerate; the longest
            name that covers a module holds.
        layers: The model's layers.
        model_type: The model's family.

    Returns:
        Half-open boundaries, and the place of each stage.

    Raises:
        PartitionFormatError: If a name is unknown, a layer has no place or several, or a place comes back after
            another one.
    """
    units, names = units_of(layers, model_type), module_names(model_type)
    inside = _check_known(places, units, names)
    boundaries, stages = [0], [_place_of(units[0], places, inside, names.optional)]
    for unit in units[1:]:
        place = _place_of(unit, places, inside, names.optional)
        if place == stages[-1]:
            continue
        if place in stages:
            raise PartitionFormatError(
                f"{unit.modules[0]!r} is in place {shown(place)} again, after {shown(stages[-1])}; a stage is one run "
                "of layers. Put the layers between on the same place, or these on another."
            )
        stages.append(place)
        boundaries.append(unit.start)
    return (*boundaries, len(layers)), tuple(stages)


def _check_known(
    places: Mapping[str, Hashable], units: Sequence[Unit], names: ModuleNames
) -> Mapping[str, set[Hashable]]:
    """Refuses unknown names; gives the places inside each module that has names of its own parts."""
    modules = {module for unit in units for module in unit.modules}
    above = {prefix for module in modules for prefix in _ancestors(module)}
    inside: dict[str, set[Hashable]] = {}
    for name, place in places.items():
        if name in modules or name in above or name in names.weightless:
            continue
        owner = next((prefix for prefix in _ancestors(name) if prefix in modules), None)
        if owner is None:
            examples = ", ".join([*units[0].modules, f"{names.blocks}.0", *names.norm, *names.head])
            raise PartitionFormatError(
                f"the model has no module {shown(name)} among its layers, which are named {examples}; correct the "
                "name, or the model type."
            )
        inside.setdefault(owner, set()).add(place)
    return inside


def _place_of(
    unit: Unit, places: Mapping[str, Hashable], inside: Mapping[str, set[Hashable]], optional: Sequence[str]
) -> Hashable:
    found: set[Hashable] = set()
    for module in unit.modules:
        covering = next((name for name in (module, *_ancestors(module)) if name in places), None)
        if covering is None and module not in inside and module not in optional:
            raise PartitionFormatError(f"{module!r} has no place; give it, or a module around it, one.")
        found |= inside.get(module, set())
        if covering is not None:
            found.add(places[covering])
    if len(found) > 1:
        several = sorted(str(place) for place in found)
        raise PartitionFormatError(
            f"{' with '.join(unit.modules)} is spread over {shown(several)}; a layer is on one stage. Give its modules "
            "one place."
        )
    return found.pop()


def _ancestors(name: str) -> list[str]:
    """Names of the modules around a module, innermost first; the whole model, ``""``, last."""
    if len(name) > _LONGEST_NAME:
        return []
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1)] + ([""] if name else [])
