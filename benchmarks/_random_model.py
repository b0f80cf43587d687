"""Checkpoints with random weights, for claims on memory, time, bytes and resuming, which weights do not change."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any


def write(config: dict[str, Any], folder: Path, *, shard_bytes: int) -> Path:
    """A bfloat16 folder of this config, made once: weights of standard deviation 0.02, norms 1, a tokenizer of bytes.

    Tokens 0 to 256 are end of text and the 256 bytes, whatever the vocabulary's size.
    """
    if folder.exists():
        return folder
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from pennyweight import families
    from pennyweight.disk.writer import Writer

    generator = torch.Generator().manual_seed(0)
    writer = Writer(folder, shard_bytes=shard_bytes)
    for block in families.blocks(config).values():
        for name, weight in block.tensors().items():
            tensor = torch.empty(weight.shape, dtype=torch.bfloat16)
            tensor.fill_(1.0) if len(weight.shape) == 1 else tensor.normal_(0.0, 0.02, generator=generator)
            writer.add(name, tensor)
    alphabet = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    staged = folder.with_name(folder.name + "-tokenizer")
    fast.save_pretrained(staged)
    writer.finish(config, like=staged)
    shutil.rmtree(staged)
    return folder
