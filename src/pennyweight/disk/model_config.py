"""config.json: what of it any family reads, checked before anything is made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from pennyweight import families
from pennyweight.disk import reading
from pennyweight.disk.reading import Said

CONFIG = "config.json"
_MAX_CONFIG = 4 * 2**20

_Size = Annotated[int, Field(ge=1, lt=2**31)]
_OrNone = Annotated[int, Field(ge=0, lt=2**31)]  # 0: a block that is gone
_Layers = Annotated[int, Field(ge=1, le=2**10)]
_Heads = Annotated[int, Field(ge=1, le=2**10)]
_Positive = Annotated[float, Field(gt=1e-30, lt=1e30)]
_Word = Annotated[str, Field(max_length=60)]
_Part = Annotated[float, Field(gt=0, le=1)]
_Share = Annotated[float, Field(ge=0, lt=1)]


class _Rotary(Said):
    rope_type: _Word | None = None
    type: _Word | None = None
    rope_theta: _Positive | None = None
    factor: _Positive | None = None
    original_max_position_embeddings: _Size | None = None
    attention_factor: _Positive | None = None
    beta_fast: _Positive | None = None
    beta_slow: _Positive | None = None
    low_freq_factor: _Positive | None = None
    high_freq_factor: _Positive | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    partial_rotary_factor: _Part | None = None
    truncate: bool | None = None
    short_factor: list[_Positive] | None = None
    long_factor: list[_Positive] | None = None


class _Rotaries(_Rotary):
    """Of a model, or of each kind of its layers."""

    full_attention: _Rotary | None = None
    sliding_attention: _Rotary | None = None


class _Sparsity(Said):
    model_config = ConfigDict(extra="forbid")

    entering: _Share = 0.0
    inner: _Share = 0.0
    weighted: bool = False


class _Layer(Said):
    """What may differ by layer: all that we build."""

    model_config = ConfigDict(extra="forbid")

    num_key_value_heads: Annotated[int, Field(ge=0, le=2**10)] | None = None
    intermediate_size: _OrNone | None = None
    sliding_window: Annotated[int, Field(ge=1)] | None = None
    num_local_experts: _Size | None = None
    num_experts_per_tok: _Size | None = None
    skip: list[str] = Field([])
    replace_with_linear: list[str] = Field([])
    sparsity: dict[Literal["attention", "mlp"], _Sparsity] = Field({})


class _Weights(Said):
    num_bits: int
    type: str
    symmetric: Literal[True]


class _Group(Said):
    targets: list[str]
    weights: _Weights


class _Quantization(Said):
    quant_method: Literal["compressed-tensors"]
    format: str
    config_groups: dict[str, _Group]


class _Config(Said):
    """config.json, as far as any family reads it. null is for transformers to make something of."""

    model_type: _Word
    vocab_size: _Size | None = None
    hidden_size: _Size | None = None
    intermediate_size: _OrNone | None = None
    num_hidden_layers: _Layers | None = None
    num_attention_heads: _Heads | None = None
    num_key_value_heads: Annotated[int, Field(ge=0, le=2**10)] | None = None
    head_dim: Annotated[int, Field(ge=1, le=2**14)] | None = None
    hidden_act: _Word | None = None
    hidden_activation: _Word | None = None
    rms_norm_eps: Annotated[float, Field(gt=0, lt=1)] | None = None
    max_position_embeddings: Annotated[int, Field(ge=1, le=families.MOST_POSITIONS)] | None = None
    tie_word_embeddings: bool | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    use_sliding_window: bool | None = None
    sliding_window: Annotated[int, Field(ge=1)] | None = None
    max_window_layers: int | None = None
    sliding_window_pattern: _Layers | None = None
    layer_types: Annotated[list[str], Field(max_length=2**10)] | None = None
    num_local_experts: _Size | None = None
    num_experts_per_tok: _Size | None = None
    rope_theta: _Positive | None = None
    rope_local_base_freq: _Positive | None = None
    rope_parameters: _Rotaries | None = None
    rope_scaling: _Rotary | None = None
    partial_rotary_factor: _Part | None = None
    no_rope_layers: Annotated[list[Annotated[int, Field(ge=0, le=1)]], Field(max_length=2**10)] | None = None
    no_rope_layer_interval: _Layers | None = None
    embedding_multiplier: _Positive | None = None
    attention_multiplier: _Positive | None = None
    residual_multiplier: _Positive | None = None
    logits_scaling: _Positive | None = None
    query_pre_attn_scalar: _Positive | None = None
    attn_logit_softcapping: _Positive | None = None
    final_logit_softcapping: _Positive | None = None
    use_bidirectional_attention: bool | None = None
    original_max_position_embeddings: _Size | None = None
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    torch_dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    per_layer_config: dict[Annotated[str, Field(pattern="^[0-9]{1,4}$")], _Layer] | None = None
    quantization_config: _Quantization | None = None
    # What transformers would act on and we do not, or only by layer.
    is_causal: Literal[True] | None = None
    skip: Annotated[list[str], Field(max_length=0)] | None = None
    replace_with_linear: Annotated[list[str], Field(max_length=0)] | None = None
    sparsity: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    configuration_files: None = None
    transformers_weights: None = None


def read_config(folder: Path) -> families.Resolved:
    """config.json of a model folder (or the file itself), with what transformers makes of the keys it leaves open.
    Raises FileNotFoundError or ValueError."""
    path = folder / CONFIG if folder.is_dir() else folder
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is not a model: expected a folder with config.json and *.safetensors, or a GGUF file"
        )
    said = reading.json_file(path, dict[str, Any], most_bytes=_MAX_CONFIG)
    if "model_type" not in said:
        raise ValueError(f"{path} has no model_type; it is not a transformers config")
    reading.checked(path, said, _Config)
    return families.resolved(said, str(path))
