"""A peer's half of a comparison, in an interpreter of its own: one model to a few bits as its documentation shows, the
result as a folder that transformers reads. Says its seconds as JSON.

    python _quantize_peer.py auto-round|llm-compressor|hqq MODEL OUT BITS GROUP TEXT

TEXT: a file of one JSON string a line, the same calibration documents for all that look at text.
"""

import json
import sys
import time
from pathlib import Path

ROWS, TOKENS = 128, 512


def auto_round(model: str, out: str, bits: int, group: int, texts: list[str]) -> None:
    """Weights of the grid, unpacked: "fake" in its words. Its own defaults otherwise, on these texts."""
    from auto_round import AutoRound  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    rows = _rows(tokenizer, texts)
    batches = [{"input_ids": row[None], "attention_mask": (row[None] >= 0).long()} for row in rows]
    made = AutoRound(
        loaded, tokenizer, bits=bits, group_size=group, sym=True, dataset=batches, nsamples=len(rows), seqlen=TOKENS
    )
    made.quantize()
    made.save_quantized(out, format="fake", inplace=True)


def llm_compressor(model: str, out: str, bits: int, group: int, texts: list[str]) -> None:
    """GPTQ, symmetric, written as pack-quantized."""
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]
    from llmcompressor.modifiers.quantization import GPTQModifier  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    rows = Dataset.from_list([{"input_ids": row.tolist()} for row in _rows(tokenizer, texts)])
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    recipe = GPTQModifier(config_groups={"all": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
    oneshot(model=loaded, dataset=rows, recipe=recipe, max_seq_length=TOKENS, num_calibration_samples=len(rows))
    loaded.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)


def hqq(model: str, out: str, bits: int, group: int, texts: list[str]) -> None:
    """Weights of the grid, unpacked; it looks at no text."""
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, Quantizer  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model)
    config = BaseQuantizeConfig(nbits=bits, group_size=group)["weight_quant_params"]
    for name, module in loaded.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            made = Quantizer.quantize(module.weight.data, device="cpu", compute_dtype=torch.float32, **config)
            module.weight.data = Quantizer.dequantize(*made).float()
    loaded.save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)


def _rows(tokenizer, texts: list[str]):
    import torch

    ids = [i for text in texts for i in tokenizer(text)["input_ids"]]
    count = min(ROWS, len(ids) // TOKENS)
    return torch.tensor(ids[: count * TOKENS]).view(count, TOKENS)


if __name__ == "__main__":
    which, model, out, bits, group, text = sys.argv[1:]
    documents = [json.loads(line) for line in Path(text).read_text().splitlines()]
    started = time.perf_counter()
    ways = {"auto-round": auto_round, "llm-compressor": llm_compressor, "hqq": hqq}
    ways[which](model, out, int(bits), int(group), documents)
    print(json.dumps({"seconds": time.perf_counter() - started}))
