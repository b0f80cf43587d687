"""A model folder as a whole transformers model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pennyweight import families, formats
from pennyweight.disk.checkpoint import Checkpoint
from pennyweight.formats import packed_int
from pennyweight.live.patch import installed

STOCK = packed_int.CONFIG_FORMAT
"""The one format that transformers reads itself."""


def compute_dtype(wanted: str = "auto") -> torch.dtype:
    """What models compute in: bfloat16 where the processor has it, else float32, several times as fast there."""
    if wanted == "auto":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        wanted = "bfloat16" if fast else "float32"
    return torch.bfloat16 if wanted == "bfloat16" else torch.float32


def load_model(folder: Path, *, dtype: torch.dtype | None = None) -> Any:
    """The whole model of a folder, ordinary or heterogeneous, packed matrices dequantised, as a transformers model, in
    `dtype` or else what `compute_dtype` picks.

    Raises ValueError if tensors are missing from the folder or the model has no place for some of them.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = compute_dtype() if dtype is None else dtype
    config = AutoConfig.from_pretrained(folder)
    if (getattr(config, "quantization_config", None) or {}).get("format", STOCK) != STOCK:
        return _load_own(folder, config, dtype)
    if getattr(config, "quantization_config", None):
        config.quantization_config["dequantize"] = True
    with installed(), _quiet_progress():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
        )
    model, info = loaded
    wrong = {kind: sorted(info.get(kind) or ())[:3] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(wrong.values()):
        raise ValueError(f"{folder} does not fit the model its config describes: {wrong}")
    return model.eval()


def load_stock(folder: Path, *, layers: int | None = None) -> Any:
    """What transformers by itself loads from a folder, in float32; with `layers`, of the first ones only. Nothing of
    ours decides what is loaded, except where layers differ: those are beyond transformers alone.

    Raises ValueError if transformers cannot load it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config: Any = AutoConfig.from_pretrained(folder, **options)
        if layers is not None:
            config.num_hidden_layers = layers
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[:layers]
        with installed() if config.is_heterogeneous else contextlib.nullcontext(), _quiet_progress():
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype=torch.float32, use_safetensors=True, **options
            )
    except Exception as err:  # whatever transformers stumbles over
        raise ValueError(f"transformers cannot load {folder}: {' '.join(str(err).split())[:300]}") from err
    return model.eval()


def _load_own(folder: Path, config: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    del config.quantization_config
    with installed():
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    checkpoint, state = Checkpoint(folder), {}
    left = set(checkpoint.entries)
    names = {name for block in families.blocks(checkpoint.config).values() for name in block.tensors()}
    for name in names:
        packed = formats.read(name, checkpoint.entries, checkpoint.read)
        if not packed:
            raise ValueError(f"{folder} does not fit the model its config describes: {name} is missing")
        state[name] = formats.unpack(packed).to(dtype)
        left -= {formats.on_disk(name, suffix) for suffix in packed}
    if left:
        raise ValueError(f"{folder} does not fit the model its config describes: no place for {sorted(left)[:3]}")
    missing, _ = model.load_state_dict(state, strict=False)
    assert set(missing) <= set(model.state_dict()) - names, missing
    model.tie_weights()
    return model.eval()


@contextlib.contextmanager
def _quiet_progress() -> Iterator[None]:
    """transformers draws progress bars of its own while loading; only the command line draws here."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
