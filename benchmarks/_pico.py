"""Pico models made on the spot, with tokenizers and templates: what scripts about faults damage in their own way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 320
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    "olmo2": {"num_attention_heads": 4, "num_key_value_heads": 2},
}


def model(
    folder: Path, model_type: str = "llama", *, dtype: str = "bfloat16", gain: float = 4.0, **changes: Any
) -> Path:
    """A random model of a few thousand weights. `gain`: of its matrices, so that blocks matter."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **SHAPES[model_type],
        **changes,
    }
    torch.manual_seed(1)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "embed" not in name:
                parameter.mul_(gain)
    made.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer(folder)
    return folder


def tokenizer(folder: Path, *, slow: bool = False, template: str = TEMPLATE, added: tuple[str, ...] = ()) -> Path:
    """A tokenizer of bytes: `slow` in the older files (vocab.json, merges.txt, added_tokens.json)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    settings = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[0], "chat_template": template}
    if slow:
        words = {token: i for token, i in vocabulary.items() if token not in SPECIAL[1:]}
        words = {token: i for i, token in enumerate(words)}
        (folder / "vocab.json").write_text(json.dumps(words))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        more = {token: len(words) + i for i, token in enumerate(("<unused>", *SPECIAL[1:]))}
        (folder / "added_tokens.json").write_text(json.dumps(more))
        said = {"tokenizer_class": "GPT2Tokenizer", **settings, "eos_token": SPECIAL[2], "unk_token": SPECIAL[0]}
        (folder / "tokenizer_config.json").write_text(json.dumps(said))
        return folder
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, additional_special_tokens=[*SPECIAL[1:], *added], **settings)
    fast.save_pretrained(folder)
    return folder


def config_with(folder: Path, **changes: Any) -> None:
    """Change config.json; None removes a key."""
    path = folder / "config.json"
    said = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in said.items() if value is not None}))


def gguf(
    folder: Path, out: Path, *, types: dict[str, int] | None = None, more: Any = None, drop: tuple[str, ...] = ()
) -> Path:
    """The model of a llama folder as a GGUF file of 16-bit weights. `types`: token types by token (1 NORMAL, 3 CONTROL,
    4 USER_DEFINED); `more(writer)` adds metadata; `drop`: metadata left out."""
    import gguf as library
    import numpy as np

    from pennyweight.disk.checkpoint import Checkpoint

    checkpoint = Checkpoint(folder)
    config = checkpoint.config
    writer = library.GGUFWriter(out, "llama")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    told = {
        "context_length": lambda: writer.add_context_length(config["max_position_embeddings"]),
        "embedding": lambda: writer.add_embedding_length(config["hidden_size"]),
        "layers": lambda: writer.add_block_count(config["num_hidden_layers"]),
        "ffn": lambda: writer.add_feed_forward_length(config["intermediate_size"]),
        "heads": lambda: writer.add_head_count(heads),
        "kv_heads": lambda: writer.add_head_count_kv(kv_heads),
        "epsilon": lambda: writer.add_layer_norm_rms_eps(1e-6),
    }
    for name, tell in told.items():
        if name not in drop:
            tell()
    tokens = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = {**tokens["model"]["vocab"], **{a["content"]: a["id"] for a in tokens["added_tokens"]}}
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    words += ["ab"]  # for the one merge
    words += [f"<pad{i}>" for i in range(config["vocab_size"] - len(words))]
    kinds = [(types or {}).get(w, 3 if w in SPECIAL else 1) for w in words]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)
    if more:
        more(writer)
    names = library.get_tensor_name_map(library.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name in checkpoint.entries:
        weights = checkpoint.read(name).float().numpy()
        for own, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if own in name and weights.ndim == 2:
                rows, columns = weights.shape
                pairs = weights.reshape(count, 2, rows // count // 2, columns)
                weights = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)
        kind = library.GGMLQuantizationType.F32 if weights.ndim == 1 else library.GGMLQuantizationType.F16
        stored = weights if weights.ndim == 1 else weights.astype(np.float16)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")) or name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
