"""A GGUF file as a source: its metadata as transformers' config, its tensors under transformers' names.

Three things in such files are not as transformers has them. Files of some architectures hold the rows of q_proj and
k_proj in an order in which rotary pairs are neighbours; they are put back in halves here, which changes no number,
since scales run along columns. Norms that lack 1 in transformers are whole. And Llama 3's rotary scaling is a tensor of
divisors instead of a config entry.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, TensorNameMap, dequantize, get_tensor_name_map

from pennyweight import families
from pennyweight.families import MOST_POSITIONS
from pennyweight.sources.gguf import ggml
from pennyweight.sources.gguf.architectures import ARCHITECTURES, Architecture
from pennyweight.sources.gguf.file import File, Tensor, read
from pennyweight.sources.source import Vocabulary, rearranged

DIVISORS = "rope_freqs.weight"
_CHUNK_WEIGHTS = 2**22  # converted at once, to bound what is held in between


class GgufSource:
    """Raises ValueError on opening for a damaged file, an architecture or a setting that is not run, and tensors that
    are missing, of another shape, or that the model has no place for."""

    def __init__(self, path: Path, *, mapped: bool = False) -> None:
        self._file, self._mapped, self._rearranged = read(path), mapped, 0
        self.name = path.stem
        self.config = families.resolved(config_of(self._file), str(path))
        self.blocks = families.blocks(self.config)
        self._converted: Counter[ggml.Kind] = Counter()
        arch = self._file.get("general.architecture", str)
        self._said, self._architecture = _warnings(self._file, self.config), ARCHITECTURES[arch]
        self._tensors: dict[str, Tensor] = {}
        self._lacking: dict[str, float] = {}
        names = get_tensor_name_map(MODEL_ARCH[arch.upper()], n_blocks=1)
        left = dict(self._file.tensors)
        parts = self._take_apart(left, names)
        divisors = left.pop(DIVISORS, None)
        for block in self.blocks.values():
            for name, weight in block.tensors().items():
                if name.endswith("norm.weight"):
                    self._lacking[name] = block.norm_offset
                stored = parts.get(name) or stored_name(names, name)
                tensor = left.pop(stored, None)
                if tensor is None or tensor.shape != weight.shape:
                    came = "is missing" if tensor is None else f"has shape {tensor.shape}"
                    raise ValueError(f"{path}: {stored} {came}; the metadata promise shape {weight.shape}")
                self._tensors[name] = tensor
        if left:
            raise ValueError(
                f"{path}: {len(left)} tensors have no place in a {self.config['model_type']} model as we know it: "
                f"{', '.join(sorted(left)[:3])} ...; without them it would compute something else"
            )
        self.rotary_divisors: np.ndarray | None = None
        if divisors is not None:
            half, found = self.config["head_dim"] // 2, self._floats(divisors, 0, self._file.read(divisors))[0]
            if divisors.shape != (half,) or not (found > 0).all():
                raise ValueError(f"{path}: {DIVISORS} of shape {divisors.shape}; expected {half} positive numbers")
            self.rotary_divisors = found

    @property
    def notes(self) -> list[str]:
        converted = [
            f"{count} {kind.name} {'matrix' if count == 1 else 'matrices'}: {kind.loss}"
            for kind, count in self._converted.items()
            if kind.loss
        ]
        return [*self._said, *converted, *(rearranged(self._rearranged) if self._mapped else ())]

    def vector(self, name: str) -> np.ndarray:
        tensor, order = self._tensors[name], self._order(name)
        values = self._floats(tensor, 0, self._file.read(tensor))[0] - np.float32(self._lacking.get(name, 0))
        return values if order is None else values[order]

    def matrices(self, names: Sequence[str]) -> list[Any]:
        return [self.matrix(name) for name in names]

    def matrix(self, name: str) -> Any:
        from pennyweight import _native

        tensor, order = self._tensors[name], self._order(name)
        kind, (count, columns) = tensor.kind, tensor.shape
        in_place = self._mapped and kind.split is None and order is None
        self._rearranged += not in_place
        if kind.split is None:
            raw = self._file.map(tensor) if in_place else np.empty((count, tensor.row_bytes), np.uint8)
            for first, part in self._chunks(tensor):
                self._floats(tensor, first, part)
                if not in_place:
                    raw[first : first + len(part)] = part
            stored = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}[kind.name]
            return _native.Matrix.wide(raw if order is None else raw[order], _native.Float[stored], in_place)
        self._converted[kind] += 1
        rows = self._quantised(tensor)
        arrays = [
            part if part is None or order is None else part[order] for part in (rows.codes, rows.scales, rows.minima)
        ]
        return _native.Matrix.rows(*arrays, columns, kind.bits, ggml.Rows.GROUP, False)

    def vocabulary(self) -> Vocabulary:
        from pennyweight.sources.gguf.vocabulary import vocabulary

        found, notes = vocabulary(self._file, self.config["vocab_size"])
        self._said += notes
        return found

    def _take_apart(self, left: dict[str, Tensor], names: TensorNameMap) -> dict[str, str]:
        """Put in the place of every tensor that holds several matrices, one's rows under another's, what each is.
        Returns what they are called by the names of the matrices."""
        called: dict[str, str] = {}
        weights = {name: weight for block in self.blocks.values() for name, weight in block.tensors().items()}
        for whole, parts in families.joined(self.config).items():
            stored, first = stored_name(names, f"{whole}.weight"), 0
            tensor = left.get(stored)
            rows = {f"{part}.weight": weights[f"{part}.weight"].shape[0] for part in parts}
            if tensor is None or len(tensor.shape) != 2 or tensor.shape[0] != sum(rows.values()):
                called |= dict.fromkeys(rows, stored)  # which is told as one that is missing, or does not fit
                continue
            del left[stored]
            for name, count in rows.items():
                called[name] = f"{stored} from row {first} on"
                start = tensor.start + first * tensor.row_bytes
                left[called[name]] = replace(tensor, shape=(count, tensor.shape[1]), start=start)
                first += count
        return called

    def _chunks(self, tensor: Tensor) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, some rows as stored), the whole tensor in all."""
        count, columns = tensor.shape
        step = max(1, _CHUNK_WEIGHTS // columns)
        for first in range(0, count, step):
            yield first, self._file.read(tensor, first, min(step, count - first))

    def _floats(self, tensor: Tensor, first: int, raw: np.ndarray) -> np.ndarray:
        values = dequantize(raw, tensor.kind.type)
        if not np.isfinite(values).all():
            raise self._damage(tensor, first, "NaN or infinite values")
        return values

    def _quantised(self, tensor: Tensor) -> ggml.Rows:
        parts: list[ggml.Rows] = []
        for first, raw in self._chunks(tensor):
            try:
                parts.append(ggml.rows(tensor.kind, raw))
            except ValueError as err:
                raise self._damage(tensor, first, str(err)) from err
        minima = [part.minima for part in parts if part.minima is not None]
        return ggml.Rows(
            np.concatenate([part.codes for part in parts]),
            np.concatenate([part.scales for part in parts]),
            np.concatenate(minima) if minima else None,
        )

    def _damage(self, tensor: Tensor, first: int, what: str) -> ValueError:
        start = tensor.start + first * tensor.row_bytes
        return ValueError(f"{self._file.path}: {tensor.name} from byte {start} on: {what}; the file is damaged")

    def _order(self, name: str) -> np.ndarray | None:
        return order_of(self._architecture, self.config, name, self._tensors[name].shape[0])


def order_of(architecture: Architecture, config: Mapping[str, Any], name: str, rows: int) -> np.ndarray | None:
    """Which stored row belongs in each place of the tensor `name`, or None if they lie in their places."""
    if not architecture.interleaved or ".self_attn." not in name:
        return None
    part = name.split(".")[-2]
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}.get(part)
    if heads is None:
        return None
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def stored_name(names: TensorNameMap, name: str) -> str:
    """model.layers.3.self_attn.q_proj.bias -> blk.3.attn_q.bias, from a map of one layer: a map of all has 270 entries
    for each, and how many there are is the file's word."""
    layer = "".join(re.findall(r"^model\.layers\.(\d+)\.", name))
    stored = names.get_name(name.replace(f"layers.{layer}.", "layers.0.", 1), try_suffixes=(".weight", ".bias"))
    assert stored is not None, f"{name} has no name in such files"
    return stored.replace("blk.0.", f"blk.{layer}.", 1)


def config_of(file: File) -> dict[str, Any]:
    """transformers' config.json of a file. Raises ValueError for an architecture or a setting that is not run, and for
    metadata that contradict themselves."""
    arch = file.get("general.architecture", str)
    if arch not in ARCHITECTURES:
        raise ValueError(f"{file.path}: architecture {arch!r} is not run; supported are {', '.join(ARCHITECTURES)}")

    def need(key: str, default: int | None = None) -> int:
        value = file.get(f"{arch}.{key}", int, default)
        if value < 1:
            raise ValueError(f"{file.path}: {arch}.{key} is {value}; expected a positive number")
        return value

    def has(tensor: str) -> bool:
        return f"blk.0.{tensor}" in file.tensors

    if file.get(f"{arch}.expert_count", int, 0):
        raise ValueError(f"{file.path}: a mixture of experts; only dense {arch} models are run")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError(f"{file.path}: token_embd.weight is missing or no matrix; it is not a whole language model")
    hidden, heads = need("embedding_length"), need("attention.head_count")
    kv_heads, head_dim = need("attention.head_count_kv", heads), need("attention.key_length", max(1, hidden // heads))
    own = ARCHITECTURES[arch]
    config: dict[str, Any] = {
        "model_type": own.model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": need("context_length"),
        "rms_norm_eps": file.get(f"{arch}.attention.layer_norm_rms_epsilon", float),
        "hidden_act": "silu",
        "rope_parameters": _rope(file, arch),
        "attention_bias": has("attn_q.bias"),
        "mlp_bias": has("ffn_gate.bias"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    turning = need("rope.dimension_count", head_dim)
    if own.partial and turning % 2 == 0 and turning < head_dim:
        config["rope_parameters"]["partial_rotary_factor"] = turning / head_dim
    for holds, what in (
        (heads % kv_heads == 0, f"{heads} heads on {kv_heads} key-value heads"),
        (head_dim % 2 == 0, f"head_dim {head_dim}, which is odd"),
        (need("attention.value_length", head_dim) == head_dim, "values of another width than keys"),
        (turning == head_dim or (own.partial and turning < head_dim), "rotary embedding on a part of each head"),
        (config["num_hidden_layers"] <= len(file.tensors), f"{config['num_hidden_layers']} layers in fewer tensors"),
        (config["max_position_embeddings"] <= MOST_POSITIONS, f"a context above {MOST_POSITIONS} tokens"),
        (0 < config["rms_norm_eps"] < 1, f"an epsilon of {config['rms_norm_eps']}"),
    ):
        if not holds:
            raise ValueError(f"{file.path}: the metadata ask for {what}; the engine does not run that")
    return {**config, **own.own(file, config)}


def _rope(file: File, arch: str) -> dict[str, Any]:
    """transformers' rope_parameters. Without a type, a factor scales linearly."""
    base = file.get(f"{arch}.rope.freq_base", float, 10000.0)
    scaling = f"{arch}.rope.scaling"
    kind = file.get(f"{scaling}.type", str, "linear")
    factor = file.get(f"{scaling}.factor", float, file.get(f"{arch}.rope.scale_linear", float, 1.0)) or 1.0
    if not (0 < base < 1e30 and 0 < factor < 1e6):
        raise ValueError(f"{file.path}: rotary base {base} and factor {factor}; expected positive numbers")
    if kind == "none" or (kind == "linear" and factor == 1):
        return {"rope_type": "default", "rope_theta": base}
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": base, "factor": factor}
    others = (("attn_factor", 1.0), ("yarn_attn_factor", 1.0), ("yarn_log_multiplier", 0.0))
    if kind != "yarn" or any(file.get(f"{scaling}.{key}", float, usual) != usual for key, usual in others):
        raise ValueError(f"{file.path}: rotary scaling {kind!r} or its factors are not run; none, linear and yarn are")
    return {
        "rope_type": "yarn",
        "rope_theta": base,
        "factor": factor,
        "original_max_position_embeddings": file.get(
            f"{scaling}.original_context_length", int, file.get(f"{arch}.context_length", int)
        ),
        "beta_fast": file.get(f"{scaling}.yarn_beta_fast", float, 32.0),
        "beta_slow": file.get(f"{scaling}.yarn_beta_slow", float, 1.0),
    }


def _warnings(file: File, config: dict[str, Any]) -> list[str]:
    window = file.get(f"{file.get('general.architecture', str)}.attention.sliding_window", int, 0)
    if config.get("sliding_window") == window or not 0 < window < config["max_position_embeddings"]:
        return []
    return [f"the file names a sliding window of {window} tokens, which is not applied, as in llama.cpp"]
