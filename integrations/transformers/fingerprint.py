"""What tells two copies of a model directory apart without reading all of it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from lp_plugin.errors import WeightsError
from lp_plugin.files import open_regular
from lp_plugin.model.architecture import read_config

__all__ = ["model_digest"]

_SAMPLES, _SAMPLE_BYTES = 32, 1 << 16
"""Pieces of each file that are read, and how long they are: 2 MB, whatever the file's size."""


def model_digest(directory: str | Path) -> str:
    """SHA-256 of configuration and weights, in hexadecimal; of weights names, sizes and evenly spread samples.

    Two trainings of one model differ everywhere, and so in the samples; a change of a few weights may not.

    Raises:
        ModelConfigError: If the configuration can't be read.
        WeightsError: If a file can't be read.
    """
    digest = hashlib.sha256(json.dumps(read_config(directory), sort_keys=True).encode())
    for file in sorted(Path(directory).glob("*.safetensors")):
        try:
            with open_regular(file) as opened:
                size = os.fstat(opened.fileno()).st_size
                digest.update(f"{file.name}:{size}".encode())
                for sample in range(_SAMPLES):
                    opened.seek(sample * max(size - _SAMPLE_BYTES, 0) // (_SAMPLES - 1))
                    digest.update(opened.read(_SAMPLE_BYTES))
        except OSError as error:
            reason = error.strerror or error
            raise WeightsError(f"{file} can't be read: {reason}; copy the model directory again.") from None
    return digest.hexdigest()
