"""llama.cpp's half of a comparison, in an interpreter of its own: reads commands as JSON lines, answers with seconds.

Run by `_llama.Worker` with the interpreter that has llama-cpp-python. Tokens go straight to llama_decode, without what
the Python package does around it, and the next token is the largest logit, as on our side.
"""

import ctypes
import json
import sys
import time
from pathlib import Path

import llama_cpp  # pyright: ignore[reportMissingImports]


def main() -> None:
    context, vocabulary = None, 0
    for line in sys.stdin:
        asked = json.loads(line)
        if "load" in asked:
            llama_cpp.llama_backend_init()
            settings = llama_cpp.llama_model_default_params()
            settings.use_mmap = False  # pages of a file are small ones
            model = llama_cpp.llama_model_load_from_file(asked["load"].encode(), settings)
            if not model:
                raise SystemExit(f"llama.cpp does not load {asked['load']}")
            vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
            options = llama_cpp.llama_context_default_params()
            options.n_ctx = asked["context"]
            options.n_batch = options.n_ubatch = 512
            options.n_threads = options.n_threads_batch = asked["threads"]
            options.no_perf = True
            context = llama_cpp.llama_init_from_model(model, options)
            answer = {"vocabulary": vocabulary, "huge_bytes": _huge_bytes()}
        elif "prompt" in asked:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
            answer = {"seconds": [_decode(context, asked["prompt"])]}
        elif "logits" in asked:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
            _logits(context, asked["logits"], vocabulary, asked["to"])
            answer = {}
        else:
            seconds, tokens = [], []
            for _ in range(asked["write"]):
                logits = llama_cpp.llama_get_logits_ith(context, -1)
                at = ctypes.addressof(logits.contents)
                token = _largest((ctypes.c_float * vocabulary).from_address(at))
                seconds.append(_decode(context, [token]))
                tokens.append(token)
            answer = {"seconds": seconds, "tokens": tokens}
        print(json.dumps(answer), flush=True)


def _decode(context, tokens: list) -> float:
    array = (llama_cpp.llama_token * len(tokens))(*tokens)
    batch = llama_cpp.llama_batch_get_one(array, len(tokens))
    started = time.perf_counter()
    if llama_cpp.llama_decode(context, batch):
        raise SystemExit("llama_decode failed")
    llama_cpp.llama_synchronize(context)
    return time.perf_counter() - started


def _logits(context, tokens: list, vocabulary: int, to: str) -> None:
    """Write the logits behind every token to a .npy file."""
    import numpy as np

    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
    if llama_cpp.llama_decode(context, batch):
        raise SystemExit("llama_decode failed")
    rows = [llama_cpp.llama_get_logits_ith(context, i) for i in range(len(tokens))]
    np.save(to, [np.ctypeslib.as_array(row, (vocabulary,)).copy() for row in rows])
    llama_cpp.llama_batch_free(batch)


def _huge_bytes() -> int:
    """Of this process' memory, what lies in huge pages; 0 where the system does not tell."""
    told = Path("/proc/self/smaps_rollup")
    lines = told.read_text().splitlines() if told.exists() else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))


def _largest(values) -> int:
    import numpy as np

    return int(np.frombuffer(values, np.float32).argmax())


if __name__ == "__main__":
    main()
