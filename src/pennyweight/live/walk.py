"""Walk a checkpoint layer by layer: build one decoder layer, use it, drop it.

This is what keeps memory bounded by the largest block. The modules are transformers' own classes, one at a time, so
what a layer computes is what the whole transformers model computes (tests hold the logits equal).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from pennyweight import kinds
from pennyweight.disk.checkpoint import Checkpoint
from pennyweight.families._decoder import BLOCK, NORM, tensor_names
from pennyweight.formats import _matrix
from pennyweight.live import patch as heterogeneous
from pennyweight.live.parts import Parts
from pennyweight.model.shapes import Shape
from pennyweight.model.slots import Kind, Slot
from pennyweight.model.stored import BFLOAT16, Stored

_VOCABULARY_PART = 2**14  # of the output matrix in float32 at once


class Walk:
    """A checkpoint seen as embed, layers, norm, head.

    Layers run in `dtype` weights with float32 activations between them; use torch.autocast around for bfloat16 math.
    """

    def __init__(self, checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32) -> None:
        """Raises ValueError for an unsupported family or tensors that are missing or of another shape."""
        self.checkpoint = checkpoint
        self.family: ModuleType = kinds.family_of(checkpoint.config["model_type"])
        if self.family.MODULE is None:
            raise ValueError(f"{checkpoint.config['model_type']} models can be planned (penny plan), not yet built")
        self.shapes: dict[Slot, Shape] = self.family.slots(checkpoint.config)
        self.dtype = dtype
        self._modeling = importlib.import_module(self.family.MODULE)
        self.config = AutoConfig.for_model(**checkpoint.config)
        self.config._attn_implementation = "sdpa"
        for slot, shape in self.shapes.items():
            expected = {weight.name: weight.shape for weight in shape.weights()}
            for weight, name in tensor_names(slot, shape).items():
                found = self._stored_shape(name)
                if found != expected[weight]:
                    raise ValueError(
                        f"{checkpoint.folder}: {name} {'is missing' if found is None else f'has shape {found}'}; "
                        f"config.json promises shape {expected[weight]}"
                    )

    @property
    def layers(self) -> int:
        return self.checkpoint.config["num_hidden_layers"]

    @property
    def tied(self) -> bool:
        return bool(self.checkpoint.config.get("tie_word_embeddings", False))

    def _stored_shape(self, name: str) -> tuple[int, ...] | None:
        entries = self.checkpoint.entries
        if name in entries:
            return entries[name].shape
        return (
            _matrix.shape_of({"weight_shape": self.checkpoint.read(f"{name}_shape")})
            if f"{name}_shape" in entries
            else None
        )

    def stored(self, slot: Slot) -> set[Stored]:
        """How the slot's matrices lie on disk."""
        found = set()
        for name in tensor_names(slot, self.shapes[slot]).values():
            if f"{name}_shape" in self.checkpoint.entries:
                found.add(_matrix.stored_of(self._parts(name)))
            elif len(self.checkpoint.entries[name].shape) > 1:
                found.add(BFLOAT16)
        return found

    def _parts(self, name: str) -> dict[str, torch.Tensor]:
        return _matrix.parts(name, self.checkpoint.entries, self.checkpoint.read)

    def _read(self, name: str) -> torch.Tensor:
        """One tensor in the walk's dtype. Raises ValueError if it is not finite."""
        return self._as_stored(name).to(self.dtype)

    def _as_stored(self, name: str) -> torch.Tensor:
        """One tensor as it is on disk, or as its format computes it. Raises ValueError if it is not finite."""
        if name in self.checkpoint.entries:
            tensor = self.checkpoint.read(name)
        else:
            tensor = _matrix.unpack(self._parts(name))
        bad = sum(int((~torch.isfinite(part)).sum()) for part in tensor.view(-1).split(2**24))
        if bad:
            raise ValueError(f"{name} holds {bad} NaN or infinite values; the checkpoint is damaged, fetch it again")
        return tensor

    def layer(self, index: int) -> nn.Module:
        """One decoder layer with its weights, in eval mode, not training."""
        with torch.device("meta"), heterogeneous.installed():
            layer = getattr(self._modeling, f"{self.family.PREFIX}DecoderLayer")(self.config, index)
        prefix = f"model.layers.{index}."
        names = [
            name
            for slot in (Slot("mixer", index), Slot("ffn", index))
            for name in tensor_names(slot, self.shapes[slot]).values()
        ]
        layer.load_state_dict({name.removeprefix(prefix): self._read(name) for name in names}, assign=True, strict=True)
        return layer.eval().requires_grad_(False)

    def parts(self, layer: nn.Module, slot: Slot) -> Parts:
        return Parts(layer, slot.kind, self.shapes[slot])

    def embedding(self) -> nn.Embedding:
        weight = self._read("model.embed_tokens.weight")
        return nn.Embedding.from_pretrained(weight, freeze=True)

    def norm(self) -> nn.Module:
        norm = getattr(self._modeling, f"{self.family.PREFIX}RMSNorm")(
            self.config.hidden_size, eps=self.config.rms_norm_eps
        )
        norm.weight = nn.Parameter(self._read("model.norm.weight"), requires_grad=False)
        return norm.eval()

    def head(self) -> nn.Linear:
        """The output projection; a tied one is the embedding's matrix, read again."""
        weight = self._read("model.embed_tokens.weight" if self.tied else "lm_head.weight")
        head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        head.weight = nn.Parameter(weight, requires_grad=False)
        return head

    def vocabulary_matrix(self, kind: Kind) -> torch.Tensor:
        """The matrix of `embed` or `head` in no more bits than on disk: float32 would double the largest of all."""
        return self._as_stored("lm_head.weight" if kind == "head" and not self.tied else "model.embed_tokens.weight")

    @cached_property
    def _rotary(self) -> Any:
        return rotary_embedding(self.checkpoint.config)

    def positions(self, tokens: int) -> dict[str, Any]:
        """The position arguments every decoder layer takes, for rows that start at position 0."""
        ids = torch.arange(tokens).unsqueeze(0)
        probe = torch.zeros(1, dtype=torch.float32)
        return {"position_ids": ids, "position_embeddings": self._rotary(probe, ids)}


def rotary_embedding(config: Mapping[str, Any]) -> Any:
    """transformers' module that gives (cosines, sines) of positions, for a config.json of a supported family."""
    family = kinds.family_of(config["model_type"])
    modeling = importlib.import_module(family.MODULE)
    return getattr(modeling, f"{family.PREFIX}RotaryEmbedding")(config=AutoConfig.for_model(**config))


def float_logits(states: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Logits in float32 arithmetic, the matrix converted a part at a time: whole it would be twice the checkpoint's."""
    with torch.autocast("cpu", enabled=False):
        parts = [states.float() @ rows.float().T for rows in matrix.split(_VOCABULARY_PART)]
    return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]


def run_layer(layer: nn.Module, hidden: torch.Tensor, positions: dict[str, Any]) -> torch.Tensor:
    """(rows, tokens, hidden_size) through one causal decoder layer, no cache."""
    return layer(hidden, attention_mask=None, use_cache=False, **positions)


def run_slot(layer: Any, kind: str, hidden: torch.Tensor, positions: dict[str, Any]) -> torch.Tensor:
    """What the slot adds to the residual stream: its block on the normed hidden states."""
    normed = getattr(layer, NORM[kind])(hidden)
    block = getattr(layer, BLOCK[kind])
    if kind == "ffn":
        return block(normed)
    return block(hidden_states=normed, attention_mask=None, past_key_values=None, **positions)[0]


def autocast(dtype: torch.dtype) -> Any:
    """bfloat16 arithmetic where weights are bfloat16, plain float32 otherwise. Activations between layers stay
    float32 either way."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
