"""What a run reads beside a plan: a model directory, texts, and what an interrupted run has left."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fuzz_kind import GENERATE, RUN, Kind
from transformers import AutoConfig

from lp_plugin import ModelProfile
from lp_plugin.generate.settings import checked_settings
from lp_plugin.integrations.transformers.decoder import DecoderStage
from lp_plugin.integrations.transformers.weights import check_checkpoint, load_stage
from lp_plugin.job.checks import check_buildable, model_fingerprint
from lp_plugin.job.documents import load_tokenizer, read_documents
from lp_plugin.job.journal import Journal
from lp_plugin.score.scores import Score

__all__ = ["run_kinds"]

_JSONL = b"""\
{"id": 1, "text": "One line."}

{"id": "b", "text": "Caf\\u00e9, and more.", "other": [1]}
{"id": 3, "text": ""}
"""


def run_kinds(model: Path, sharded: Path) -> tuple[Kind, ...]:
    """What a run reads beside a plan: the parts of a model directory, texts, and what an interrupted run has left."""
    score, generate = (*RUN, "text.txt"), (*GENERATE, "text.txt")
    config = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)

    def weights(path: Path) -> None:
        check_checkpoint(config, path.parent)
        load_stage(DecoderStage(config, 0, 5), path.parent, "cpu", torch.float32)

    def part(
        name: str,
        form: str,
        api: Callable[[Path], object],
        *commands: tuple[str, ...],
        of: Path = model,
        **options: Any,
    ) -> Kind:
        raw = (of / name).read_bytes()
        return Kind(
            name=f"model's {name}",
            form=form,
            file=f"model/{name}",
            seeds=(raw,),
            api=api,
            commands=commands,
            model=of,
            **options,
        )

    def built(path: Path) -> None:
        check_buildable(path.parent, ModelProfile.from_config(path.parent).dtype)

    def settings(path: Path) -> object:
        return checked_settings(path.parent, max_new_tokens=4, sample=None, temperature=None, top_k=None, top_p=None)

    def journal(path: Path) -> None:
        left = Journal(path.with_suffix(""), "digest", (1, "b", 3), Score)
        left.append({index: Score(num_tokens=1, log_likelihood=-1.0) for index in left.missing()})
        left.finish()

    lines = [{"job": "digest"}, *({"index": index, "num_tokens": 2, "log_likelihood": -3.25} for index in range(3))]
    whole = "".join(json.dumps(line) + "\n" for line in lines).encode()
    return (
        part("config.json", "json", built, score, generate, weight=6),
        part("model.safetensors", "safetensors", weights, score, weight=10),
        part("model.safetensors.index.json", "json", weights, score, of=sharded, weight=8),
        part(
            "model-00001-of-00002.safetensors",
            "safetensors",
            lambda path: model_fingerprint(path.parent, "float32"),
            score,
            of=sharded,
        ),
        part("tokenizer.json", "json", lambda path: load_tokenizer(path.parent), score, generate),
        part("tokenizer_config.json", "json", lambda path: load_tokenizer(path.parent), score),
        part("generation_config.json", "json", settings, generate),
        Kind(
            name="documents, .jsonl",
            form="jsonl",
            file="in.jsonl",
            seeds=(_JSONL,),
            api=read_documents,
            commands=((*RUN, "in.jsonl"), (*GENERATE, "in.jsonl")),
            model=model,
            weight=10,
        ),
        Kind(
            name="documents, .txt",
            form="text",
            file="in.txt",
            seeds=(b"One line.\r\n\n \nCaf\xc3\xa9.\n",),
            api=read_documents,
            commands=((*RUN, "in.txt"), (*GENERATE, "in.txt")),
            model=model,
        ),
        Kind(
            name="journal",
            form="jsonl",
            file="out.jsonl.partial",
            seeds=(whole, whole[:-30], whole[:17]),
            api=journal,
            weight=6,
        ),
    )
