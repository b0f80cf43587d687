"""A model folder or a GGUF file as a whole transformers model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pennyweight import families, formats
from pennyweight.disk import reading
from pennyweight.disk.gguf.file import gguf_of
from pennyweight.disk.gguf.file import read as read_gguf
from pennyweight.disk.opened import open_checkpoint, open_config
from pennyweight.live.joined import take_apart
from pennyweight.live.patch import installed
from pennyweight.live.walk import Walk, attention_of


def compute_dtype(wanted: str = "auto") -> torch.dtype:
    """What models compute in: bfloat16 where the processor has it, else float32, several times as fast there."""
    if wanted == "auto":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        wanted = "bfloat16" if fast else "float32"
    return torch.bfloat16 if wanted == "bfloat16" else torch.float32


def load_model(folder: Path, *, dtype: torch.dtype | None = None) -> Any:
    """The whole model of a folder, ordinary or heterogeneous, or of a GGUF file, packed matrices dequantised, as a
    transformers model, in `dtype` or else what `compute_dtype` picks. No pickle is read, and no code of a folder runs.

    Raises ValueError if tensors are missing from the folder or the model has no place for some of them.
    """
    from transformers import AutoModelForCausalLM

    dtype = compute_dtype() if dtype is None else dtype
    walk = Walk(open_checkpoint(folder))
    if gguf_of(folder) is not None:
        return _load_own(walk, families.transformers_config(walk.checkpoint.config), dtype)
    generation = folder / "generation_config.json"
    if generation.exists():
        reading.json_file(generation, dict[str, Any])
    config = families.transformers_config(walk.checkpoint.config)
    if (getattr(config, "quantization_config", None) or {}).get("format", formats.STOCK) != formats.STOCK:
        return _load_own(walk, config, dtype)
    if getattr(config, "quantization_config", None):
        config.quantization_config["dequantize"] = True
    with installed(), _quiet_progress():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                attn_implementation=attention_of(walk.family),
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except Exception as err:  # whatever other people's code raises
            said = " ".join(f"{type(err).__name__}: {err}".split())
            raise ValueError(f"{folder}: transformers cannot load it: {said[:300]}") from err
    model, info = loaded
    wrong = {kind: sorted(info.get(kind) or ())[:3] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(wrong.values()):
        raise ValueError(f"{folder} does not fit the model its config describes: {wrong}")
    take_apart(model, walk.blocks.values(), whole=True)
    return model.eval()


def why_no_stock(folder: Path) -> str | None:
    """Why transformers by itself cannot read a model that we can; None if it can."""
    if (file := gguf_of(folder)) is None:
        return None
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    arch = read_gguf(file).get("general.architecture", str)
    return None if arch in GGUF_SUPPORTED_ARCHITECTURES else f"transformers reads no GGUF files of {arch}"


def load_stock(folder: Path, *, layers: int | None = None) -> Any:
    """What transformers by itself loads from a folder or a GGUF file, in float32; with `layers`, of the first ones only
    (of a folder). Nothing of ours decides what is loaded, except where layers differ, which is beyond transformers
    alone, and for the config of a GGUF file: transformers leaves out some of the metadata, such as widths of heads.

    Raises ValueError if transformers cannot load it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if (file := gguf_of(folder)) is not None:
        assert layers is None, "transformers reads GGUF files whole"
        folder, options["gguf_file"] = file.parent, file.name
    try:
        config: Any = (
            AutoConfig.from_pretrained(folder, **options)
            if file is None
            else families.transformers_config(open_config(file))
        )
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


def _load_own(walk: Walk, config: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    if walk.left:
        raise ValueError(
            f"{walk.checkpoint.path} does not fit the model its config describes: no place for {walk.left[:3]}"
        )
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with installed():
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention_of(walk.family)
        )
    take_apart(model, walk.blocks.values(), whole=True)
    checkpoint = walk.checkpoint
    names = {name for block in walk.blocks.values() for name in block.tensors()}
    state = {name: formats.unpack(formats.read(name, checkpoint.entries, checkpoint.read)).to(dtype) for name in names}
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
