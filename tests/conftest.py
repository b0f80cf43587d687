"""Pico models made on the spot: every supported family, a few thousand weights, with a tokenizer of their own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from pennyweight import kinds

# The same examples every time, so that a red suite is red for everyone; PENNY_EXPLORE=1 looks for new ones.
hypothesis.settings.register_profile("penny", derandomize=not os.environ.get("PENNY_EXPLORE"), deadline=None)
hypothesis.settings.load_profile("penny")

# Triton's kernels run in its interpreter, and it decides when it is first imported; 0 runs them on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # tests run side by side; two threads each would wait for one another
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # every process that a test starts would compile everything anew
os.environ["PENNY_CACHE"] = tempfile.mkdtemp(prefix="penny-tests-")  # nobody's own measurements are read or written

VOCABULARY = 300


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 300 tokens, trained on a few lines of this file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(__file__).read_text()], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


FAMILIES: dict[str, dict[str, Any]] = {
    family.MODEL_TYPES[0]: family.PICO
    for family in (kinds.load("families", name) for name in kinds.names("families"))
    if family.MODULE is not None
}
"""What each family that can be built says of a small model, by model_type."""

DISTINCT = ("llama", "gemma3_text", "phi3")
"""Families between which everything occurs that whole jobs treat differently: biases, norms of heads, norms on both
sides, layers of several kinds, tied embeddings, matrices that are one on disk. What a family says of its own layers is
tried with all of them; jobs, scores and sparse children with these."""


@pytest.fixture(scope="session")
def pico(tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """pico("llama", num_hidden_layers=2, ...) -> folder of a random bfloat16 model, made once per set of arguments."""
    made: dict[str, Path] = {}

    def make(model_type: str, **changes: Any) -> Path:
        key = f"{model_type}{sorted(changes.items())}"
        if key not in made:
            made[key] = _make(model_type, changes, tokenizer_file, tmp_path_factory.mktemp("pico") / model_type)
        return made[key]

    return make


def _make(model_type: str, changes: dict[str, Any], tokenizer_file: Path, folder: Path) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
        **FAMILIES[model_type],
        **changes,
    }
    torch.manual_seed(len(model_type) + sum(map(ord, model_type)))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms at exactly one and biases at zero would hide mistakes
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "embed" not in name:
                parameter.mul_(4.0)  # random models are too tame: blocks should matter
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file), bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def families() -> list[str]:
    return list(FAMILIES)
