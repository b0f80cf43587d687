"""A model folder as a GGUF file: the same codes and scales where llama.cpp has a type for them.

Everything is decided before a byte is written: the metadata that the file will have are read as a file's are
(disk/gguf/), and a model that comes out another, in a shape, a rotary table or the ids of a text, is
refused. What is rounded for want of a type is rounded because `rounded` says so.

llama.cpp's block types have a float16 scale for every 32 columns. Codes of 4 bits around zero are Q4_0, of 5 Q5_0, of
8 Q8_0; 3 and 6 bits are some of the codes of 4 and 8; a scale for more columns is said again for every 32. Scales are
bfloat16 on our side: those above 2**-17 are float16 as well, and a matrix with a smaller one has no type.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import gguf
import numpy as np
import torch
from gguf.constants import GGMLQuantizationType as Type
from gguf.constants import LlamaFileType

from pennyweight import families, formats
from pennyweight.disk import places
from pennyweight.disk.checkpoint import Checkpoint
from pennyweight.disk.gguf import ggml
from pennyweight.disk.gguf.architectures import ARCHITECTURES, Architecture
from pennyweight.disk.gguf.checkpoint import DIVISORS, order_of, stored_name
from pennyweight.disk.gguf.config import config_of
from pennyweight.disk.gguf.file import File, Tensor
from pennyweight.export import gguf_tokens as tokens
from pennyweight.live.walk import RotaryEmbedding, Walk
from pennyweight.model.blocks import Block
from pennyweight.model.stored import BFLOAT16
from pennyweight.runtime.sources.folder import Folder

Rounded = Literal["f16", "q8_0"]
_FILE_TYPES = {
    Type.F32: LlamaFileType.ALL_F32,
    Type.F16: LlamaFileType.MOSTLY_F16,
    Type.BF16: LlamaFileType.MOSTLY_BF16,
}
_FILE_TYPES |= {
    Type.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    Type.Q5_0: LlamaFileType.MOSTLY_Q5_0,
    Type.Q8_0: LlamaFileType.MOSTLY_Q8_0,
}
_CODED = {Type.Q4_0: 4, Type.Q5_0: 5, Type.Q8_0: 8}
"""Types of codes around zero with a scale for every 32 columns, and the most bits of a code, fewest first."""
_SAME_TURN = 1e-5
"""Relative: files keep the base of rotary frequencies in float32."""


@dataclass(frozen=True)
class Written:
    """The file, its bytes, its matrices by type, and those that `rounded` had to be asked for."""

    path: Path
    nbytes: int
    types: Mapping[str, int]
    rounded: int


@dataclass(frozen=True)
class _Matrix:
    """A tensor to be: what it is made of, one's rows under another's, and as which type. `exact`: to the bit."""

    names: tuple[str, ...]
    type: Type
    exact: bool


def write(
    folder: Path, out: Path, *, rounded: str | None = None, heard: Callable[[int, int], None] = lambda *_: None
) -> Written:
    """Write a model folder as the file `out`; it appears whole. `rounded`: what matrices without a type of their own
    become. `heard` is told how many tensors are done, and of how many.

    Raises ValueError, before anything is written, for a model that llama.cpp cannot hold, with the reason and what
    would do, and for an `out` that exists or lies in the model.
    """
    if rounded not in (None, *get_args(Rounded)):
        raise ValueError(f"--round {rounded}: matrices can be rounded to {' or '.join(get_args(Rounded))}")
    places.apart(out, "--out", {"the model": folder})
    if out.exists():
        raise ValueError(f"{out} exists; choose another --out or delete it")
    checkpoint = Checkpoint(folder)
    blocks = Walk(checkpoint).blocks
    name, architecture = _architecture(checkpoint)
    _refuse_unlike_layers(checkpoint, blocks.values())
    planned = dict(_matrices(checkpoint, blocks.values(), name, rounded))
    vectors = dict(_vectors(checkpoint, blocks.values(), name))
    divisors = _divisors(checkpoint.config)
    tensors = {stored: _tensor(checkpoint, stored, each) for stored, each in planned.items()}
    tensors |= {stored: Tensor(stored, ggml.KINDS[Type.F32.value], value.shape, 0) for stored, value in vectors.items()}
    metadata = {**_metadata(checkpoint, blocks.values(), name, planned), **tokens.metadata(Folder(folder))}
    file = File(folder, metadata, tensors)
    _hold_against(checkpoint, file, divisors)
    tokens.hold_against(Folder(folder), file)
    if divisors is not None:
        vectors[DIVISORS] = divisors
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    try:
        _put(partial, file, checkpoint, architecture, planned, vectors, heard)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    types = Counter(each.type.name for each in planned.values())
    return Written(out, out.stat().st_size, types, sum(not each.exact for each in planned.values()))


def _put(
    path: Path,
    file: File,
    checkpoint: Checkpoint,
    architecture: Architecture,
    planned: Mapping[str, _Matrix],
    vectors: Mapping[str, np.ndarray],
    heard: Callable[[int, int], None],
) -> None:
    """The bytes of the file. Tensors wait in a temporary file, not in memory."""
    writer = gguf.GGUFWriter(path, file.get("general.architecture", str), use_temp_file=True)
    try:
        for key, value in file.metadata.items():
            if key != "general.architecture":  # the writer's own
                _add(writer, key, value)
        for done, (stored, matrix) in enumerate(planned.items()):
            rows = [_rows(checkpoint, architecture, each, matrix.type) for each in matrix.names]
            writer.add_tensor(stored, np.concatenate(rows), raw_dtype=matrix.type)
            heard(done + 1, len(planned))
        for stored, vector in vectors.items():
            writer.add_tensor(stored, vector)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
        if writer.temp_file is not None:  # which it closes only when all went well
            writer.temp_file.close()
    with path.open("rb") as written:
        os.fsync(written.fileno())


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, list | np.ndarray):
        writer.add_array(key, value if isinstance(value, list) else value.tolist())
    else:
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](key, value)


# ---------------------------------------------------------------------------------------------- what llama.cpp can hold


def _architecture(checkpoint: Checkpoint) -> tuple[str, Architecture]:
    model_type = checkpoint.config["model_type"]
    if model_type == "mistral":
        return "llama", ARCHITECTURES["llama"]
    for name, architecture in ARCHITECTURES.items():
        if architecture.model_type == model_type:
            return name, architecture
    known = ", ".join(sorted({each.model_type for each in ARCHITECTURES.values()} | {"mistral"}))
    raise ValueError(f"{checkpoint.path}: {model_type} models are not written as GGUF; these are: {known}")


def _bare(shape: Any) -> Any:
    """Without how its matrices are kept."""
    kept = {"stored": BFLOAT16, "apart": ()}
    return replace(shape, **{name: value for name, value in kept.items() if name in vars(shape)})


def _refuse_unlike_layers(checkpoint: Checkpoint, blocks: Collection[Block]) -> None:
    """Raises ValueError for layers that are not the family's own: llama.cpp builds a file's layers alike."""
    said = {key: value for key, value in checkpoint.config.said.items() if key != "per_layer_config"}
    alike = families.blocks(families.resolved(said, checkpoint.config.where))
    for block in blocks:
        if getattr(block.shape, "sparsity", None) is not None:
            raise ValueError(
                f"{checkpoint.path}: {block.slot} leaves channels out (activation sparsity), which llama.cpp has "
                "nothing for; fit without the axis sparsity"
            )
        if _bare(block.shape) != _bare(alike[block.slot].shape):
            raise ValueError(
                f"{checkpoint.path}: {block.slot} is not shaped as other layers are, and llama.cpp builds all layers "
                "alike; a child of penny quantize, or of penny fit --axes bits, can be exported"
            )


def _matrices(
    checkpoint: Checkpoint, blocks: Collection[Block], name: str, rounded: str | None
) -> Iterator[tuple[str, _Matrix]]:
    """Every matrix of the file by its name there. Raises ValueError for one without a type, unless it is `rounded`."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[name.upper()], n_blocks=1)
    wholes = {part: (whole, parts) for whole, parts in families.joined(checkpoint.config).items() for part in parts}
    for block in blocks:
        for each, weight in block.tensors().items():
            if not weight.is_matrix:
                continue
            whole, parts = wholes.get(each.removesuffix(".weight"), (each.removesuffix(".weight"), None))
            members = (each,) if parts is None else tuple(f"{part}.weight" for part in parts)
            if each != members[0]:
                continue
            yield stored_name(names, f"{whole}.weight"), _typed(checkpoint, members, rounded)


def _typed(checkpoint: Checkpoint, members: tuple[str, ...], rounded: str | None) -> _Matrix:
    found = [_type(formats.read(each, checkpoint.entries, checkpoint.read)) for each in members]
    types = {kind for kind, _ in found}
    if len(types) == 1 and (kind := types.pop()) is not None:
        return _Matrix(members, kind, True)
    why = next((reason for _, reason in found if reason), "its parts are kept in different ways")
    if rounded is None:
        raise ValueError(
            f"{checkpoint.path}: llama.cpp has no type for {members[0]}: {why}; --round f16 or --round q8_0 rounds "
            "such matrices"
        )
    columns = formats.of_parts(parts := formats.read(members[0], checkpoint.entries, checkpoint.read)).shape_of(parts)[
        1
    ]
    if rounded == "q8_0" and columns % ggml.Rows.GROUP:
        raise ValueError(f"{checkpoint.path}: Q8_0 keeps whole 32 columns, {members[0]} has {columns}; use --round f16")
    return _Matrix(members, {"f16": Type.F16, "q8_0": Type.Q8_0}[rounded], False)


def _type(parts: Mapping[str, torch.Tensor]) -> tuple[Type | None, str]:
    """The type that holds a matrix to the bit, or None and why there is none."""
    floats = {torch.bfloat16: Type.BF16, torch.float16: Type.F16, torch.float32: Type.F32}
    found = formats.codes(parts)
    if found is None:
        matrix = formats.unpack(parts)
        return (floats[matrix.dtype], "") if formats.stored_of(parts) == BFLOAT16 else (None, "it is kept by columns")
    codes, scale = found
    group = codes.shape[1] // scale.shape[1]
    if group % ggml.Rows.GROUP:
        return None, f"{group} columns share a scale, which is no multiple of 32"
    if not torch.equal(scale.half().float(), scale.float()):
        return None, "a scale of it is too small or too large for float16"
    bits = formats.stored_of(parts).bits
    return next(kind for kind, most in _CODED.items() if bits <= most), ""


def _vectors(checkpoint: Checkpoint, blocks: Collection[Block], name: str) -> Iterator[tuple[str, np.ndarray]]:
    """Norms and biases in float32, by their names in the file."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[name.upper()], n_blocks=1)
    for block in blocks:
        for each, weight in block.tensors().items():
            if weight.is_matrix:
                continue
            values = checkpoint.read(each).float().numpy()
            if each.endswith("norm.weight"):
                values = values + np.float32(block.norm_offset)
            order = order_of(ARCHITECTURES[name], checkpoint.config, each, len(values))
            yield stored_name(names, each), np.ascontiguousarray(values if order is None else _put_in(values, order))


def _put_in(rows: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Rows as they are stored, of which reading takes `order`."""
    stored = np.empty_like(rows)
    stored[order] = rows
    return stored


def _rows(checkpoint: Checkpoint, architecture: Architecture, name: str, kind: Type) -> np.ndarray:
    """A matrix as a type: floats (rows, columns), or (rows, bytes) uint8."""
    parts = formats.read(name, checkpoint.entries, checkpoint.read)
    found = formats.codes(parts) if kind in _CODED else None
    if found is not None:
        codes, scale = (part.float().numpy() if part.is_floating_point() else part.numpy() for part in found)
        wide = scale.repeat(codes.shape[1] // scale.shape[1] // ggml.Rows.GROUP, axis=1)
        rows = {Type.Q4_0: ggml.q4_0, Type.Q5_0: ggml.q5_0, Type.Q8_0: ggml.q8_0}[kind](codes, wide)
    else:
        matrix = formats.unpack(parts)
        if kind == Type.BF16:
            rows = matrix.contiguous().view(torch.uint8).numpy()
        elif kind == Type.Q8_0:
            rows = gguf.quants.quantize(matrix.float().numpy(), kind)
        else:
            rows = matrix.to({Type.F16: torch.float16, Type.F32: torch.float32}[kind]).numpy()
    order = order_of(architecture, checkpoint.config, name, len(rows))
    return np.ascontiguousarray(rows if order is None else _put_in(rows, order))


def _tensor(checkpoint: Checkpoint, stored: str, matrix: _Matrix) -> Tensor:
    """As it will lie in the file, but for where."""
    shapes = []
    for name in matrix.names:
        parts = formats.read(name, checkpoint.entries, checkpoint.outline)
        shapes.append(formats.of_parts(parts).shape_of(parts))
    rows = sum(shape[0] for shape in shapes)
    return Tensor(stored, ggml.KINDS[matrix.type.value], (rows, shapes[0][1]), 0)


# ------------------------------------------------------------------------------------------------------- metadata


def _metadata(
    checkpoint: Checkpoint, blocks: Collection[Block], name: str, planned: Mapping[str, _Matrix]
) -> dict[str, Any]:
    """What a file says of its model, tokenizer aside. What it cannot say is found by `_hold_against`."""
    config = checkpoint.config
    mixers: list[Any] = [block.shape for block in blocks if block.slot.kind == "mixer"]
    (most, _), *_ = Counter(matrix.type for matrix in planned.values()).most_common()
    own: dict[str, Any] = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": mixers[0].head_dim,
        "attention.value_length": mixers[0].head_dim,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "vocab_size": config["vocab_size"],
        **_rope(checkpoint, mixers[0]),
    }
    for key, called in (
        ("attention_multiplier", "attention.scale"),
        ("embedding_multiplier", "embedding_scale"),
        ("residual_multiplier", "residual_scale"),
        ("logits_scaling", "logit_scale"),
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
    ):
        if config.get(key) is not None:
            own[called] = float(config[key])
    if any(mixer.window is not None for mixer in mixers):
        own["attention.sliding_window"] = config["sliding_window"]
    return {
        "general.architecture": name,
        "general.name": checkpoint.path.resolve().name,
        "general.file_type": int(_FILE_TYPES[most]),
        "general.quantization_version": int(gguf.GGML_QUANT_VERSION),
        **{f"{name}.{key}": value for key, value in own.items()},
    }


def _rope(checkpoint: Checkpoint, mixer: Any) -> dict[str, Any]:
    """Rotary settings. Raises ValueError for a kind of scaling that files cannot say."""
    rope = families.transformers_config(checkpoint.config).rope_parameters
    local = rope.get("sliding_attention")
    rope = rope.get("full_attention", rope)
    kind, base = rope.get("rope_type", "default"), {"rope.freq_base": float(rope["rope_theta"])}
    share = rope.get("partial_rotary_factor")
    base["rope.dimension_count"] = int(mixer.head_dim * share) if share else mixer.head_dim
    if local is not None:
        base["rope.freq_base_swa"] = float(local["rope_theta"])
    if kind in ("default", "llama3"):  # llama3's are a tensor
        return base
    if kind not in ("linear", "yarn"):
        raise ValueError(
            f"{checkpoint.path}: GGUF files cannot say rotary scaling {kind!r}; default, linear, yarn and "
            "llama3 can be exported"
        )
    base |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        base["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
        for key in ("beta_fast", "beta_slow"):
            if rope.get(key) is not None:
                base[f"rope.scaling.yarn_{key}"] = float(rope[key])
    return base


def _divisors(config: Mapping[str, Any]) -> np.ndarray | None:
    """What Llama 3's scaling divides frequencies by, (head_dim / 2,) float32."""
    rope = families.transformers_config(families.resolved(config)).rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    scaled = RotaryEmbedding(config).frequencies.double().numpy()
    plain = float(rope["rope_theta"]) ** -(np.arange(len(scaled)) / len(scaled))
    return (plain / scaled).astype(np.float32)


def _hold_against(checkpoint: Checkpoint, file: File, divisors: np.ndarray | None) -> None:
    """Raises ValueError if the file, read as files are, is another model."""
    config = families.resolved(config_of(file), str(file.path))
    found = families.blocks(config)
    for slot, block in families.blocks(checkpoint.config).items():
        wanted, other = _bare(block.shape), _bare(found[slot].shape)
        if wanted != other:
            differ = [name for name in vars(wanted) if vars(wanted)[name] != vars(other).get(name)]
            said = ", ".join(f"{name} {vars(other).get(name)} instead of {vars(wanted)[name]}" for name in differ)
            raise ValueError(
                f"{checkpoint.path}: llama.cpp would compute {slot} with {said}; it cannot hold this model"
            )
    turning = (getattr(block.shape, "rotary", None) for block in found.values())
    kinds = {rotary.of for rotary in turning if rotary is not None}
    for kind in sorted(kinds, key=str):
        theirs, ours = RotaryEmbedding(config, kind), RotaryEmbedding(checkpoint.config, kind)
        if divisors is not None:
            theirs.divide(torch.from_numpy(divisors))
        error = (theirs.frequencies - ours.frequencies).abs() / ours.frequencies
        if float(error.max()) > _SAME_TURN:
            raise ValueError(f"{checkpoint.path}: GGUF files cannot say its rotary frequencies; it cannot be exported")
