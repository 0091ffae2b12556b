"""Decoders with GPT-2's names for the keys, or close to it."""

import dataclasses
import reprlib
from collections.abc import Mapping
from typing import Any, ClassVar

from lp_plugin.errors import ModelConfigError
from lp_plugin.model.architecture import Embedding
from lp_plugin.model.families.base import Biases, Depth, FamilyConfig, Length, Width
from lp_plugin.model.families.plain import EVERYWHERE, PlainConfig

__all__ = ["READERS"]

_GPT_KEYS: Mapping[str, str] = {
    "n_embd": "hidden_size",
    "n_inner": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "activation_function": "hidden_act",
}


class _Gpt(PlainConfig):
    """GPT-2's names for the keys."""

    renamed: ClassVar[Mapping[str, str]] = _GPT_KEYS
    biases: ClassVar[Biases] = EVERYWHERE
    vocab_size: Width = 50257
    hidden_size: Width = 768
    intermediate_size: Width | None = None
    num_hidden_layers: Depth = 12
    num_attention_heads: Width = 12
    hidden_act: str = "gelu_new"
    max_position_embeddings: Length = 1024
    tie_word_embeddings: bool = True


class GPT2(_Gpt):
    """A stored table of positions."""

    max_position_embeddings: Width = 1024

    def embedding(self) -> Embedding:
        """With the positions."""
        return dataclasses.replace(super().embedding(), positions=self.max_position_embeddings)


class GPTBigCode(GPT2):
    """GPT-2 with one key and value head for all queries."""

    hidden_act: str = "gelu_pytorch_tanh"
    multi_query: bool = True

    def kv_heads(self) -> int:
        """One, or one for each query's."""
        return 1 if self.multi_query else self.num_attention_heads


class GPTNeo(GPT2):
    """Every other block looks at a window; transformers' cache keeps all positions."""

    renamed: ClassVar[Mapping[str, str]] = {
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "activation_function": "hidden_act",
    }
    biases: ClassVar[Biases] = Biases(output=True, mlp=True)
    hidden_size: Width = 2048
    num_hidden_layers: Depth = 24
    num_attention_heads: Width = 16
    max_position_embeddings: Width = 2048
    window_size: Width = 256
    attention_types: list[Any] | None = None

    def windows(self) -> tuple[int | None, ...]:
        """Window of each block, by the runs of kinds in ``attention_types``."""
        kinds: list[str] = []
        for run in self.attention_types or [[["global", "local"], 12]]:
            if (
                not isinstance(run, list)
                or len(run) != 2
                or not isinstance(run[0], list)
                or not isinstance(run[1], int)
                or not 0 <= run[1] * len(run[0]) <= self.num_hidden_layers
                or not all(isinstance(kind, str) and kind in {"global", "local"} for kind in run[0])
            ):
                raise ModelConfigError(
                    f"attention_types holds {reprlib.repr(run)}; give pairs of a list of global and local, and a "
                    f"count, for {self.num_hidden_layers} layers in all."
                )
            kinds += run[0] * run[1]
        if len(kinds) != self.num_hidden_layers:
            raise ModelConfigError(
                f"attention_types describes {len(kinds)} layers, but num_layers is {self.num_hidden_layers}; "
                "correct one of them."
            )
        return tuple(self.window_size if kind == "local" else None for kind in kinds)

    def cache_window(self, window: int | None) -> int | None:
        """None is dropped."""
        del window
        return None


class GPTJ(_Gpt):
    """Attention and MLP in parallel after one norm; biases on MLP and head alone."""

    biases: ClassVar[Biases] = Biases(mlp=True)
    parallel: ClassVar[bool] = True
    mlp_norms: ClassVar[int] = 0
    head_bias: ClassVar[bool] = True
    vocab_size: Width = 50400
    hidden_size: Width = 4096
    num_hidden_layers: Depth = 28
    num_attention_heads: Width = 16
    max_position_embeddings: Length = 2048
    tie_word_embeddings: bool = False


READERS: Mapping[str, type[FamilyConfig]] = {
    "codegen": GPTJ,
    "gpt2": GPT2,
    "gpt_bigcode": GPTBigCode,
    "gpt_neo": GPTNeo,
    "gptj": GPTJ,
}
"""``model_type`` -> how its config is read."""
