"""A peer's half of quantize.py, in an interpreter of its own: one model to 4 bits as its documentation shows, the
result as a folder that transformers reads. Says its seconds as JSON.

    python _quantize_peer.py auto-round MODEL OUT GROUP TEXT
    python _quantize_peer.py llm-compressor MODEL OUT GROUP TEXT

TEXT: a file of one JSON string a line, the same calibration documents for both.
"""

import json
import sys
import time
from pathlib import Path

ROWS, TOKENS = 128, 512


def auto_round(model: str, out: str, group: int, texts: list[str]) -> None:
    """Weights of the grid, unpacked: "fake" in its words. Its own defaults otherwise, on these texts."""
    from auto_round import AutoRound  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    rows = _rows(tokenizer, texts)
    batches = [{"input_ids": row[None], "attention_mask": (row[None] >= 0).long()} for row in rows]
    made = AutoRound(
        loaded, tokenizer, bits=4, group_size=group, sym=True, dataset=batches, nsamples=len(rows), seqlen=TOKENS
    )
    made.quantize()
    made.save_quantized(out, format="fake", inplace=True)


def llm_compressor(model: str, out: str, group: int, texts: list[str]) -> None:
    """GPTQ, symmetric, written as pack-quantized."""
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]
    from llmcompressor.modifiers.quantization import GPTQModifier  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    rows = Dataset.from_list([{"input_ids": row.tolist()} for row in _rows(tokenizer, texts)])
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    recipe = GPTQModifier(config_groups={"all": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
    oneshot(model=loaded, dataset=rows, recipe=recipe, max_seq_length=TOKENS, num_calibration_samples=len(rows))
    loaded.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)


def _rows(tokenizer, texts: list[str]):
    import torch

    ids = [i for text in texts for i in tokenizer(text)["input_ids"]]
    count = min(ROWS, len(ids) // TOKENS)
    return torch.tensor(ids[: count * TOKENS]).view(count, TOKENS)


if __name__ == "__main__":
    which, model, out, group, text = sys.argv[1:]
    documents = [json.loads(line) for line in Path(text).read_text().splitlines()]
    started = time.perf_counter()
    {"auto-round": auto_round, "llm-compressor": llm_compressor}[which](model, out, int(group), documents)
    print(json.dumps({"seconds": time.perf_counter() - started}))
