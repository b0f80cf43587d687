"""Let transformers build models whose layers differ.

transformers has the config half (`per_layer_config`), not yet the modelling half: up to 5.23 a per-layer size raises
AmbiguousGlobalPerLayerAttributeError and `skip` is silently ignored. `install` patches the decoder layers of the
families we support so that layer i is built from `config.per_layer_config[i]`:

    intermediate_size, num_key_value_heads   the layer's own sizes
    sliding_window                           a window for this layer alone (blocks.set_window)
    skip: ["attention", "mlp"]               the block is taken out, norm included (its size says 0)
    replace_with_linear: [...]               the block is one matrix (its size says 0)
    sparsity: {"attention": ..., "mlp": ...} the block leaves channels of its inputs out (blocks.leave_out)

It also mends compressed-tensors loading with `dequantize`, where transformers unpacks every matrix by the first
config group, so that a checkpoint of mixed 4 and 8 bits would load as wrong numbers without a word.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from pennyweight import kinds
from pennyweight.families._decoder import BLOCK, INNER, NORM, SKIPPED, sparsity
from pennyweight.live import blocks, magnitudes

_MARK = "_pennyweight_original"
OWN_FORMAT = "pennyweight-zigzag"
"""`format` of folders that hold matrices in zigzag, which transformers does not read."""


def install() -> None:
    """Patch transformers for this process. Doing it twice changes nothing."""
    for name in kinds.names("families"):
        family = kinds.load("families", name)
        if family.MODULE is None:
            continue
        modeling = importlib.import_module(family.MODULE)
        _patch(getattr(modeling, f"{family.PREFIX}DecoderLayer"), "__init__", _build_layer)
    from transformers.integrations.compressed_tensors import CompressedTensorsDequantize

    _patch(CompressedTensorsDequantize, "convert", _convert_by_own_scheme)


def uninstall() -> None:
    """Take the patches out again."""
    from transformers.integrations.compressed_tensors import CompressedTensorsDequantize

    _unpatch(CompressedTensorsDequantize, "convert")
    for name in kinds.names("families"):
        family = kinds.load("families", name)
        if family.MODULE is not None:
            _unpatch(getattr(importlib.import_module(family.MODULE), f"{family.PREFIX}DecoderLayer"), "__init__")


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """The patches for the length of a block, then as it was before."""
    from transformers.integrations.compressed_tensors import CompressedTensorsDequantize

    before = hasattr(CompressedTensorsDequantize.convert, _MARK)
    install()
    try:
        yield
    finally:
        if not before:
            uninstall()


def _patch(owner: type, name: str, wrapper: Any) -> None:
    original = getattr(owner, name)
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    setattr(patched, _MARK, original)
    setattr(owner, name, patched)


def _unpatch(owner: type, name: str) -> None:
    patched = getattr(owner, name)
    if hasattr(patched, _MARK):
        setattr(owner, name, getattr(patched, _MARK))


def _build_layer(original: Any, layer: Any, config: Any, layer_idx: int) -> None:
    if not getattr(config, "is_heterogeneous", False):
        original(layer, config, layer_idx)
        return
    own = config.per_layer_config[layer_idx]
    # Blocks that are about to be replaced have size 0 on disk; build them as small as transformers can.
    own.num_key_value_heads = own.num_key_value_heads or own.num_attention_heads
    own.intermediate_size = own.intermediate_size or 1
    original(layer, own, layer_idx)
    edit_layer(layer, own, layer_idx, config.per_layer_attributes)


def edit_layer(layer: Any, own: Any, layer_idx: int, differing: Collection[str]) -> None:
    """Apply the parts of a layer's config that transformers' classes do not know.

    `differing` names the keys that per_layer_config sets: a window counts only if it is among them. Raises ValueError
    on unknown words.
    """
    skip, linear = set(getattr(own, "skip", None) or ()), set(getattr(own, "replace_with_linear", None) or ())
    unknown = (skip | linear) - set(SKIPPED.values())
    if unknown:
        raise ValueError(
            f"layer {layer_idx}: per_layer_config names {sorted(unknown)}; known are {sorted(SKIPPED.values())}"
        )
    for kind, word in SKIPPED.items():
        if word in skip:
            setattr(layer, BLOCK[kind], blocks.SkippedAttention(layer_idx) if kind == "mixer" else blocks.SkippedMLP())
            setattr(layer, NORM[kind], nn.Identity())
        elif word in linear:
            hidden = own.hidden_size
            setattr(
                layer,
                BLOCK[kind],
                blocks.LinearAttention(hidden, layer_idx) if kind == "mixer" else blocks.LinearMLP(hidden),
            )
    for kind in SKIPPED:
        sparse = sparsity({"sparsity": getattr(own, "sparsity", None)}, kind)
        if sparse is not None:
            block = getattr(layer, BLOCK[kind])
            inner = getattr(block, INNER[kind])
            magnitudes.leave_out(block, own.hidden_size, sparse.entering, weighted=sparse.weighted)
            magnitudes.leave_out(inner, inner.in_features, sparse.inner, weighted=sparse.weighted)
    window = getattr(own, "sliding_window", None) if "sliding_window" in differing else None
    if window is not None and not skip & {"attention"} and not linear & {"attention"}:
        blocks.set_window(layer.self_attn, window)


def _convert_by_own_scheme(
    original: Any, operation: Any, input_dict: Any, *args: Any, full_layer_name: str | None = None, **kwargs: Any
) -> Any:
    if operation.scheme is None and full_layer_name is not None:
        from compressed_tensors.utils.match import match_name

        groups = operation.hf_quantizer.compressor.quantization_config.config_groups.values()
        module = full_layer_name.removesuffix(".weight")
        for group in groups:
            if any(match_name(module, target) for target in group.targets):
                own = type(operation)(operation.hf_quantizer, scheme=group)
                return original(own, input_dict, *args, full_layer_name=full_layer_name, **kwargs)
    return original(operation, input_dict, *args, full_layer_name=full_layer_name, **kwargs)
