"""Well-known models: their published numbers of parameters, from what is special in their configs."""

from __future__ import annotations

from typing import Any

import pytest

from lp_plugin import ModelProfile

GPT2 = {"model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024}
LLAMA_8B = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_key_value_heads": 8}
LLAMA_8B |= {"vocab_size": 128256, "rope_scaling": {"factor": 8.0, "rope_type": "llama3"}, "torch_dtype": "bfloat16"}
MIXTRAL = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}
QWEN_7B = {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28}
QWEN_7B |= {"num_hidden_layers": 28, "num_key_value_heads": 4, "vocab_size": 152064, "use_sliding_window": False}
GEMMA_9B = {"model_type": "gemma2", "hidden_size": 3584, "intermediate_size": 14336, "num_attention_heads": 16}
GEMMA_9B |= {"num_hidden_layers": 42, "num_key_value_heads": 8, "hidden_activation": "gelu_pytorch_tanh"}
OPT_350M = {"model_type": "opt", "do_layer_norm_before": False, "ffn_dim": 4096, "hidden_size": 1024}
OPT_350M |= {"num_attention_heads": 16, "num_hidden_layers": 24, "word_embed_proj_dim": 512}
PHI_2 = {"model_type": "phi", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32}
PYTHIA = {"model_type": "gpt_neox", "hidden_size": 4096, "intermediate_size": 16384, "num_attention_heads": 32}
PYTHIA |= {"num_hidden_layers": 32, "rotary_pct": 0.25, "use_parallel_residual": True}
QWEN_30B = {"model_type": "qwen3_moe", "num_hidden_layers": 48, "head_dim": 128, "mlp_only_layers": []}
BART = {"model_type": "bart", "encoder_layers": 12, "num_hidden_layers": 12}
GPT_OSS = {"model_type": "gpt_oss", "num_hidden_layers": 24, "num_local_experts": 32, "experts_per_token": 4}
GPT_OSS |= {"quantization_config": {"quant_method": "mxfp4"}}
DEEPSEEK = {"model_type": "deepseek_v3", "num_nextn_predict_layers": 1, "torch_dtype": "bfloat16"}
DEEPSEEK |= {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}}


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        pytest.param(GPT2, 124_439_808, id="GPT-2"),
        pytest.param(LLAMA_8B, 8_030_261_248, id="Llama 3.1 8B"),
        pytest.param(MIXTRAL, 46_702_792_704, id="Mixtral 8x7B"),
        pytest.param(QWEN_7B, 7_615_616_512, id="Qwen2.5 7B"),
        pytest.param(GEMMA_9B, 9_241_705_984, id="Gemma 2 9B"),
        pytest.param({"model_type": "falcon"}, 6_921_720_704, id="Falcon 7B"),
        pytest.param(OPT_350M, 331_196_416, id="OPT 350M"),
        pytest.param(PHI_2, 2_779_683_840, id="Phi-2"),
        pytest.param({"model_type": "t5"}, 60_506_624, id="T5 small"),
        pytest.param(PYTHIA, 6_857_302_016, id="Pythia 6.9B"),
        pytest.param({"model_type": "gptj"}, 6_050_882_784, id="GPT-J 6B"),
        pytest.param(QWEN_30B, 30_532_122_624, id="Qwen3 30B-A3B"),
        pytest.param(BART, 406_291_456, id="BART large"),
        pytest.param({"model_type": "bert"}, 109_514_298, id="BERT base"),
        pytest.param(GPT_OSS, 20_914_757_184, id="gpt-oss 20B"),
    ],
)
def test_published_sizes(config: dict[str, Any], parameters: int) -> None:
    assert ModelProfile.from_config(config).num_parameters == parameters


def test_a_latent_mixture_in_numbers() -> None:
    """DeepSeek-V3: 671 B in all, 37 B per token; transformers keeps 58 routers' 256 corrections as buffers."""
    profile = ModelProfile.from_config(DEEPSEEK)
    assert profile.num_parameters + 58 * 256 == 671_026_419_200
    assert round(profile.active_parameters / 1e9) == 38  # 37 without the embedding
    assert profile.weight_dtype == "float8"
    assert sum(layer.kv_bytes_per_token for layer in profile.layers) == 61 * (512 + 64) * 2
    stored = sum(layer.weight_bytes for layer in profile.layers)
    assert 1 < stored / profile.num_parameters < 1.01  # a byte each but for embedding, head and norms


def test_experts_stored_in_four_bits() -> None:
    """gpt-oss 20B: 3.6 B per token without the embeddings, 13.8 GB on disk."""
    profile = ModelProfile.from_config(GPT_OSS, dtype="bfloat16")
    assert round((profile.active_parameters - 201_088 * 2880) / 1e9, 1) == 3.6
    assert round(sum(layer.weight_bytes for layer in profile.layers) / 1e9, 1) == 13.8
