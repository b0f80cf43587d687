"""Walk a checkpoint layer by layer: build one decoder layer, use it, drop it.

This is what keeps memory bounded by the largest block. The modules are transformers' own classes, one at a time, so
what a layer computes is what the whole transformers model computes (tests hold the logits equal).
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from torch import nn

from pennyweight import families, formats
from pennyweight.disk.opened import Readable
from pennyweight.live import patch
from pennyweight.live.joined import take_apart
from pennyweight.live.parts import Parts
from pennyweight.model.shapes import Shape
from pennyweight.model.slots import Slot
from pennyweight.model.stored import Stored

_FLOATS = ("F64", "F32", "F16", "BF16")
_VALUES_AT_ONCE = 2**23  # values of the output matrix in float32


class Layer:
    """One decoder layer at work: transformers' module, and the parts of its slots."""

    def __init__(self, index: int, module: Any, parts: Mapping[Slot, Parts], walk: Walk) -> None:
        self.index, self.module, self.parts, self._walk = index, module, dict(parts), walk

    def run(self, hidden: torch.Tensor, *, together: int | None = None) -> torch.Tensor:
        """(rows, tokens, hidden_size) through the layer, causal, no cache; at most `together` rows at a time."""
        where = self.places(hidden.shape[1])
        parts = hidden.split(together or len(hidden))
        found = [self.module(rows, use_cache=False, **where) for rows in parts]
        return found[0] if len(found) == 1 else torch.cat(found)

    def places(self, tokens: int) -> dict[str, Any]:
        """The arguments of a decoder layer that say where rows of so many tokens, from position 0 on, stand."""
        mixer: Any = self.parts[Slot("mixer", self.index)].shape
        rotary = getattr(mixer, "rotary", None)
        return self._walk.places(tokens, rotary.of) if rotary else self._walk.places(tokens, turning=False)

    def fork(self, slot: Slot) -> Layer:
        """The layer with copies of one slot's modules; others are shared."""
        copied = {path: copy.deepcopy(module) for path, module in self.parts[slot].modules().items()}
        return self.having(slot, copied, self.parts[slot].shape)

    def having(self, slot: Slot, modules: Mapping[str, Any], shape: Shape) -> Layer:
        """The layer with other modules, by path, in one slot; others are shared."""
        module = copy.copy(self.module)
        module._modules = dict(self.module._modules)
        for path, other in modules.items():
            module.set_submodule(path, other)
        parts = {each: Parts(module, own.place) for each, own in self.parts.items()}
        return Layer(self.index, module, {**parts, slot: parts[slot].having(shape)}, self._walk)


class Walk:
    """A checkpoint seen as embedding, layers, last norm, head.

    Layers run in `dtype` weights with float32 activations between them; use `autocast` around for bfloat16 math.
    `left`: tensors of the files that the model has no place for.
    """

    def __init__(self, checkpoint: Readable, *, dtype: torch.dtype = torch.float32) -> None:
        """Raises ValueError for an unsupported family or tensors that are missing or of another shape."""
        self.checkpoint = checkpoint
        self.family: ModuleType = families.of(checkpoint.config["model_type"])
        if self.family.MODULE is None:
            raise ValueError(f"{checkpoint.config['model_type']} models can be planned (penny plan), not yet built")
        self.blocks = families.blocks(checkpoint.config)
        self.shapes: dict[Slot, Shape] = {slot: block.shape for slot, block in self.blocks.items()}
        self.dtype = dtype
        self.config = families.transformers_config(checkpoint.config)
        self.config._attn_implementation = attention_of(self.family)
        left = set(checkpoint.entries)
        for block in self.blocks.values():
            for name, weight in block.tensors().items():
                found = self._stored_shape(name)
                if found != weight.shape:
                    raise ValueError(
                        f"{checkpoint.path}: {name} {'is missing' if found is None else f'has shape {found}'}; "
                        f"config.json promises shape {weight.shape}"
                    )
                left -= {name} if name in left else formats.tensors_of(name)
        if left and checkpoint.config["tie_word_embeddings"]:
            left -= formats.tensors_of(families.tied(checkpoint.config)[0])  # equal to the embedding
        self.left = sorted(left)

    @property
    def notes(self) -> tuple[str, ...]:
        """What users should know of tensors that are not read."""
        if not self.left:
            return ()
        named = f"{', '.join(self.left[:3])}{' ...' if self.left[3:] else ''}"
        return (f"{self.checkpoint.path}: tensors that the config has no place for are not read: {named}",)

    @property
    def layers(self) -> int:
        return self.checkpoint.config["num_hidden_layers"]

    @cached_property
    def logits_slot(self) -> Slot:
        """The slot that holds the matrix of the logits."""
        return next(slot for slot, shape in self.shapes.items() if shape.makes_logits)

    def _stored_shape(self, name: str) -> tuple[int, ...] | None:
        """Of a weight as it is on disk; None if it is not there. Raises ValueError for parts that do not belong
        together, and for other bits than config.json says."""
        entries, folder = self.checkpoint.entries, self.checkpoint.path
        if name in entries:
            if (dtype := entries[name].dtype) not in _FLOATS:
                raise ValueError(f"{folder}: {name} is stored as {dtype}; floats are expected")
            return entries[name].shape
        try:
            parts = formats.read(name, entries, self.checkpoint.outline)
        except ValueError as err:
            raise ValueError(f"{folder}: {err}") from err
        if not parts:
            return None
        bits, said = formats.stored_of(parts).bits, self._said_bits(name.removesuffix(".weight"))
        if said not in (None, bits):
            raise ValueError(f"{folder}: {name} is stored in {bits} bits; quantization_config says {said}")
        return formats.of_parts(parts).shape_of(parts)

    def _said_bits(self, module: str) -> int | None:
        """What quantization_config says of a module, by its name or as one of all."""
        groups = (self.checkpoint.config.get("quantization_config") or {}).get("config_groups", {}).values()
        names = {module, self._whole.get(module, module), "Linear"}
        for group in groups:
            if names & set(group["targets"]):
                return group["weights"]["num_bits"]
        return None

    @cached_property
    def _whole(self) -> dict[str, str]:
        """The module on disk of every one that is a part of it."""
        return {part: whole for whole, parts in families.joined(self.checkpoint.config).items() for part in parts}

    def stored(self, slot: Slot) -> set[Stored]:
        """How the slot's matrices lie on disk."""
        found = set()
        for name, weight in self.blocks[slot].tensors().items():
            if weight.is_matrix:
                parts = formats.read(name, self.checkpoint.entries, self.checkpoint.read)
                found.add(formats.stored_of(parts))
        return found

    def _read(self, name: str) -> torch.Tensor:
        """One tensor in the walk's dtype. Raises ValueError if it is not finite."""
        return self._as_stored(name).to(self.dtype)

    def _as_stored(self, name: str) -> torch.Tensor:
        """One tensor as it is on disk, or as its format computes it. Raises ValueError if it is not finite."""
        tensor = formats.unpack(formats.read(name, self.checkpoint.entries, self.checkpoint.read))
        bad = sum(int((~torch.isfinite(part)).sum()) for part in tensor.view(-1).split(2**24))
        if bad:
            raise ValueError(f"{name} holds {bad} NaN or infinite values; the checkpoint is damaged, fetch it again")
        return tensor

    def layer(self, index: int) -> Layer:
        """One decoder layer with its weights, in eval mode, not training."""
        blocks = {slot: block for slot, block in self.blocks.items() if slot.layer == index}
        with torch.device("meta"), patch.installed():
            module = _made(self.checkpoint.config, "DecoderLayer", self.config, index)
        if not self.config.is_heterogeneous:
            patch.dress(module, blocks.values())  # a window of the family's own, which a mask would bring along
        take_apart(module, blocks.values())
        weights = {
            block.names[weight.name]: self._read(name)
            for block in blocks.values()
            for name, weight in block.tensors().items()
        }
        module.load_state_dict(weights, assign=True, strict=True)
        module.eval().requires_grad_(False)
        return Layer(index, module, {slot: Parts(module, block) for slot, block in blocks.items()}, self)

    def each(self, first: int = 0) -> Iterator[Layer]:
        """The layers from `first` on, one at a time."""
        return (self.layer(index) for index in range(first, self.layers))

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states (rows, tokens, hidden_size) float32 that enter the first layer. Their matrix stays in no more
        bits than on disk: float32 would double the largest of all."""
        return scaled(self.matrix(Slot("embed"))[ids].to(self.dtype), self._embedding.scale).float()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 logits of the states that leave the last layer."""
        return self.finished(float_logits(self.norm()(hidden), self.matrix(self.logits_slot)))

    @property
    def divisor(self) -> float:
        """What products are divided by to be logits, before a cap."""
        return self._head.divisor

    def finished(self, products: torch.Tensor) -> torch.Tensor:
        """Logits of the products of the last states with the matrix of the logits."""
        logits = products if self._head.divisor == 1 else products / self._head.divisor
        return logits if self._head.cap is None else self._head.cap * torch.tanh(logits / self._head.cap)

    def change_of_logits(self, products: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        """finished(products + change) - finished(products), to the precision that `change` itself has: tanh x - tanh y
        = tanh(x - y) (1 - tanh x tanh y)."""
        change = change if self._head.divisor == 1 else change / self._head.divisor
        if self._head.cap is None:
            return change
        before, change = products / (self._head.divisor * self._head.cap), change / self._head.cap
        return self._head.cap * torch.tanh(change) * (1 - torch.tanh(before) * torch.tanh(before + change))

    @property
    def _embedding(self) -> Any:
        return self.shapes[Slot("embed")]

    @property
    def _head(self) -> Any:
        return self.shapes[Slot("head")]

    def matrix(self, slot: Slot) -> torch.Tensor:
        """The one tensor of the embedding, last norm or head, as on disk."""
        (name,) = self.blocks[slot].tensors()
        return self._as_stored(name)

    def embedding(self) -> Parts:
        """The embedding as a module."""
        module = _Embedding.from_pretrained(self.matrix(Slot("embed")).to(self.dtype), freeze=True)
        module.scale = self._embedding.scale
        return Parts(module, self.blocks[Slot("embed")])

    def norm(self) -> nn.Module:
        """The last norm."""
        norm = _made(self.checkpoint.config, "RMSNorm", self.config.hidden_size, eps=self.config.rms_norm_eps)
        norm.weight = nn.Parameter(self.matrix(Slot("norm")).to(self.dtype), requires_grad=False)
        return norm.eval()

    def head(self, *, as_stored: bool = False) -> Parts:
        """The output projection as a module; a tied one is the embedding's slot, its matrix read again. `as_stored`: in
        the type that it has on disk, for `float_logits`."""
        weight = self.matrix(self.logits_slot)
        weight = weight if as_stored else weight.to(self.dtype)
        head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        head.weight = nn.Parameter(weight, requires_grad=False)
        return Parts(head, self.blocks[self.logits_slot])

    @functools.lru_cache(maxsize=4)  # noqa: B019  a walk lives as long as whoever asks it
    def places(self, tokens: int, of: str | None = None, *, turning: bool = True) -> dict[str, Any]:
        """The arguments that tell a decoder layer where its rows stand, from position 0 on. `of`: the kind of layer
        whose rotary tables they are, where there are several; not `turning`: a layer that looks at none."""
        ids, probe = torch.arange(tokens).unsqueeze(0), torch.zeros(1, dtype=torch.float32)
        mask = None
        if self.config._attn_implementation == "eager":  # which is not causal by itself
            mask = torch.full((1, 1, tokens, tokens), torch.finfo(torch.float32).min).triu(1)
        turned = RotaryEmbedding(self.checkpoint.config, of)(probe, ids) if turning else None
        return {"position_ids": ids, "position_embeddings": turned, "attention_mask": mask}


class RotaryEmbedding:
    """transformers' (cosines, sines) of positions, for a config.json of a supported family; of one kind of layer, where
    a model's kinds differ in that. Raises ValueError for rope parameters that it cannot compute with."""

    def __init__(self, config: Mapping[str, Any], of: str | None = None) -> None:
        found = families.resolved(config)
        made = families.transformers_config(found)
        if of is not None:
            made.layer_types = [of] * made.num_hidden_layers
        self._module = _made(found, "RotaryEmbedding", config=made)
        self._frequencies = "inv_freq" if of is None else f"{of}_inv_freq"
        self._more = {} if of is None else {"layer_type": of}
        kinds = self._module.rope_type
        self.rope_type: str = kinds if of is None else kinds[of]
        if not bool(torch.isfinite(getattr(self._module, self._frequencies)).all()):
            raise ValueError(f"{found.where}: its rope parameters give frequencies that are no numbers")

    @property
    def frequencies(self) -> torch.Tensor:
        """(turning channels / 2,) float32, in radians a position."""
        return getattr(self._module, self._frequencies)

    def divide(self, by: torch.Tensor) -> None:
        """Make frequencies so many times lower."""
        setattr(self._module, self._frequencies, getattr(self._module, self._frequencies) / by)

    def __call__(self, like: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._module(like, positions, **self._more)


class _Embedding(nn.Embedding):
    """A row for every token, times `scale`."""

    scale = 1.0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return scaled(super().forward(input), self.scale)


def scaled(rows: torch.Tensor, scale: float) -> torch.Tensor:
    """Rows of an embedding as they enter the first layer."""
    return rows if scale == 1 else rows * scale


def attention_of(family: ModuleType) -> str:
    """Which of transformers' implementations of attention computes a family's: sdpa, unless it cannot."""
    base = getattr(importlib.import_module(family.MODULE), f"{family.PREFIX}PreTrainedModel")
    return "sdpa" if base._supports_sdpa else "eager"


def _made(read: families.Resolved, part: str, *arguments: Any, **named: Any) -> Any:
    """A module of transformers' for a family. Raises ValueError for a config that transformers cannot build it from."""
    family = families.of(read["model_type"])
    modeling = importlib.import_module(family.MODULE)
    try:
        return getattr(modeling, family.PREFIX + part)(*arguments, **named)
    except Exception as err:  # whatever other people's code raises
        why = " ".join(f"{type(err).__name__}: {err}".split())
        raise ValueError(f"{read.where}: transformers cannot build its {part}: {why[:300]}") from err


def float_logits(states: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Logits in float32 arithmetic, the matrix converted a part at a time: whole it would be twice the checkpoint's."""
    with torch.autocast("cpu", enabled=False):
        some = max(1, _VALUES_AT_ONCE // matrix.shape[1])
        parts = [states.float() @ rows.float().T for rows in matrix.split(some)]
    return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]


def autocast(dtype: torch.dtype) -> Any:
    """bfloat16 arithmetic where weights are bfloat16, plain float32 otherwise. Activations between layers stay
    float32 either way."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
