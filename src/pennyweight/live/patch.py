"""Let transformers build models whose layers differ.

transformers has the config half (`per_layer_config`), not yet the modelling half: up to 5.23 a per-layer size raises
AmbiguousGlobalPerLayerAttributeError and `skip` is silently ignored. `install` patches the decoder layers of the
families we support so that layer i is built from `config.per_layer_config[i]`:

    intermediate_size, num_key_value_heads   the layer's own sizes
    sliding_window                           a window for this layer alone
    skip: ["attention", "mlp"]               the block is taken out, norms included (its size says 0)
    replace_with_linear: [...]               the block is one matrix (its size says 0)
    sparsity: {"attention": ..., "mlp": ...} the block leaves channels of its inputs out

It also mends compressed-tensors loading with `dequantize`, where transformers unpacks every matrix by the first
config group, so that a checkpoint of mixed 4 and 8 bits would load as wrong numbers without a word.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from pennyweight import families, kinds
from pennyweight.live import magnitudes
from pennyweight.live.blocks import replace_block, set_window
from pennyweight.live.parts import Parts
from pennyweight.model.blocks import Block
from pennyweight.model.shapes import Dense, Noop

_MARK = "_pennyweight_original"


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
    config.allow_global_per_layer_attribute_access = True  # whole models look at the window that masks begin with
    own = config.per_layer_config[layer_idx]
    # Blocks that are about to be replaced have size 0 on disk; build them as small as transformers can.
    own.num_key_value_heads = own.num_key_value_heads or own.num_attention_heads
    own.intermediate_size = own.intermediate_size or 1
    original(layer, own, layer_idx)
    blocks = families.blocks(config.to_dict())
    dress(layer, (block for slot, block in blocks.items() if slot.layer == layer_idx))


def dress(layer: nn.Module, blocks: Iterable[Block]) -> None:
    """Make of a decoder layer, built in the sizes that its blocks have, what transformers' classes do not know: blocks
    that are gone or one matrix, inputs that leave channels out, windows."""
    for block in blocks:
        parts, shape = Parts(layer, block), block.shape
        if isinstance(shape, Noop | Dense):
            replace_block(parts, shape)
        if shape.sparsity is not None:
            own, weighted = shape.sparsity, shape.sparsity.weighted
            magnitudes.leave_out(parts.reader("input"), shape.hidden_size, own.entering, weighted=weighted)
            magnitudes.leave_out(parts.reader("inner"), shape.inner_size, own.inner, weighted=weighted)
        if shape.window is not None:
            set_window(parts.block, shape.window)


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
