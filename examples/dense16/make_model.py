"""Write a model with random weights as a plain Hugging Face directory, from nothing but its configuration.

    python examples/dense16/make_model.py examples/dense16/small /tmp/small
    python examples/dense16/make_model.py examples/dense16 /tmp/dense16 --device cuda    # 26 GB

Names and shapes come from the model built on the meta device, so any decoder's configuration will do. Each
tensor is drawn from its own generator (seed and name), so neither the shards' size nor the number of layers
changes its values; another device or precision does.
"""

import argparse
import hashlib
import json
import tempfile
from pathlib import Path

import torch
from byte_tokenizer import END_OF_TEXT_ID, VOCABULARY_SIZE, make_byte_tokenizer
from huggingface_hub import split_torch_state_dict_into_shards
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig


class RequestError(ValueError):
    """What was asked for cannot be made; the message says why and what to do."""


def read_config(directory: Path, *, num_layers: int | None) -> PretrainedConfig:
    """The configuration in `directory`, with `num_layers` in place of its own number of layers."""
    if not (directory / "config.json").is_file():
        raise RequestError(f"no config.json in {directory}: give a directory such as examples/dense16/small")
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise RequestError(f"{directory / 'config.json'} is not a configuration: {error}") from error
    if config.vocab_size < VOCABULARY_SIZE:
        raise RequestError(f"vocab_size is {config.vocab_size}: the tokenizer needs {VOCABULARY_SIZE}")
    if num_layers is not None:
        config.num_hidden_layers = num_layers
    return config


def random_tensor(name: str, like: torch.Tensor, *, std: float, seed: int, device: str) -> torch.Tensor:
    """Biases 0, norms 1, matrices normal with `std`, as the models initialise themselves; on the CPU."""
    if name.endswith("bias"):
        return torch.zeros(like.shape, dtype=like.dtype)
    if like.dim() == 1:
        return torch.ones(like.shape, dtype=like.dtype)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    values = torch.empty(like.shape, dtype=like.dtype, device=device)
    return values.normal_(0.0, std, generator=generator).cpu()


def write_weights(config: PretrainedConfig, path: Path, device: str, seed: int, shard_bytes: int) -> None:
    """Write every tensor of the model, one shard in memory at a time, and the index if there are several."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    shapes = {name: parameter.detach() for name, parameter in model.named_parameters()}  # tied ones once
    plan = split_torch_state_dict_into_shards(shapes, max_shard_size=shard_bytes)
    std = getattr(config, "initializer_range", None) or 0.02
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("", total=sum(shape.nbytes for shape in shapes.values()))
        for file_name, names in plan.filename_to_tensors.items():
            tensors = {}
            for name in names:
                progress.update(task, description=file_name)
                tensors[name] = random_tensor(name, shapes[name], std=std, seed=seed, device=device)
                progress.advance(task, shapes[name].nbytes)
            save_file(tensors, path / file_name, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def make_model(arguments: argparse.Namespace) -> None:
    """Make the model in a temporary directory beside the output, and give it its name when it is whole."""
    output: Path = arguments.output
    config = read_config(arguments.config, num_layers=arguments.layers)
    if output.exists():
        raise RequestError(f"{output} exists: remove it or name another directory")
    if min(arguments.shard_gb, config.num_hidden_layers) <= 0:
        raise RequestError("--shard-gb and --layers must be greater than 0")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise RequestError("--device cuda, but torch sees no GPU: use --device cpu")
    config.dtype = getattr(torch, arguments.dtype) if arguments.dtype else config.dtype or torch.float32
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
        directory = Path(scratch) / output.name
        config.save_pretrained(directory)
        special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), END_OF_TEXT_ID)
        GenerationConfig(**special).save_pretrained(directory)
        make_byte_tokenizer(config.max_position_embeddings).save_pretrained(directory)
        write_weights(config, directory, arguments.device, arguments.seed, int(arguments.shard_gb * 1e9))
        directory.rename(output)


def main(argv: list[str] | None = None) -> None:
    """Read the command line, make the model; exit with 2 and a line of text if it cannot be made."""
    parser = argparse.ArgumentParser(description="Write a model with random weights.")
    parser.add_argument("config", type=Path, metavar="CONFIG_DIR")
    parser.add_argument("output", type=Path, metavar="OUTPUT_DIR")
    parser.add_argument("--layers", type=int, help="layers to make (default: the configuration's)")
    parser.add_argument("--dtype", choices=["float16", "float32"], help="(default: the configuration's)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default: cpu)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-gb", type=float, default=5.0, help="largest file, in GB (default: 5)")
    arguments = parser.parse_args(argv)
    try:
        make_model(arguments)
    except RequestError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
