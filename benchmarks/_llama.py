"""llama.cpp for comparison: its matrix kernels by ctypes, its models through llama-cpp-python.

It is built once, for this processor, into an environment of its own outside the repository (about 20 minutes on two
cores); scripts that compare with it skip with the command to do so where it is missing.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import _bench

VERSION = "0.3.36"
ENVIRONMENT = Path(os.environ.get("PENNY_LLAMA", Path.home() / ".cache" / "penny-envs" / "llama-cpp"))
MISSING = (
    f"llama-cpp-python {VERSION} is not in {ENVIRONMENT}. Build it once, about 20 minutes on 2 cores: "
    f"python3.11 -m venv {ENVIRONMENT} && CMAKE_ARGS=-DGGML_NATIVE=ON {ENVIRONMENT}/bin/pip install --no-binary "
    f"llama-cpp-python llama-cpp-python=={VERSION}"
)

TYPES = {"f16": 1, "q4_0": 2, "q8_0": 8, "q4_K": 12, "q6_K": 14}  # numbers of ggml.h


def folder() -> Path | None:
    """The installed package, or None if it was not built."""
    found = sorted(ENVIRONMENT.glob("lib/python3*/site-packages/llama_cpp"))
    return found[0] if found and any(found[0].glob("lib/libggml-cpu*")) else None


def python() -> Path:
    """The interpreter that has llama-cpp-python."""
    return ENVIRONMENT / "bin" / "python"


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_init": (ctypes.c_void_p, [_InitParams]),
    "ggml_tensor_overhead": (ctypes.c_size_t, []),
    "ggml_graph_overhead": (ctypes.c_size_t, []),
    "ggml_row_size": (ctypes.c_size_t, [ctypes.c_int, ctypes.c_int64]),
    "ggml_new_tensor_2d": (ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]),
    "ggml_mul_mat": (ctypes.c_void_p, [ctypes.c_void_p] * 3),
    "ggml_new_graph": (ctypes.c_void_p, [ctypes.c_void_p]),
    "ggml_build_forward_expand": (None, [ctypes.c_void_p, ctypes.c_void_p]),
    "ggml_quantize_chunk": (
        ctypes.c_size_t,
        [
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_void_p,
        ],
    ),
    "ggml_backend_alloc_ctx_tensors_from_buft": (ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p]),
    "ggml_backend_buffer_set_usage": (None, [ctypes.c_void_p, ctypes.c_int]),
    "ggml_backend_buffer_get_base": (ctypes.c_void_p, [ctypes.c_void_p]),
    "ggml_backend_buffer_get_size": (ctypes.c_size_t, [ctypes.c_void_p]),
    "ggml_backend_buft_name": (ctypes.c_char_p, [ctypes.c_void_p]),
    "ggml_backend_tensor_set": (None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]),
    "ggml_backend_tensor_get": (None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]),
    "ggml_backend_graph_compute": (ctypes.c_int, [ctypes.c_void_p, ctypes.c_void_p]),
    "ggml_backend_get_device": (ctypes.c_void_p, [ctypes.c_void_p]),
    "ggml_backend_dev_backend_reg": (ctypes.c_void_p, [ctypes.c_void_p]),
    "ggml_backend_reg_get_proc_address": (ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p]),
    "ggml_backend_cpu_init": (ctypes.c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [ctypes.c_void_p, ctypes.c_int]),
    "ggml_backend_cpu_buffer_type": (ctypes.c_void_p, []),
}


class Ggml:
    """ggml's CPU back-end in this process, weights in the repacked buffers that llama.cpp uses for them."""

    def __init__(self) -> None:
        """Raises RuntimeError where llama.cpp was not built."""
        home = folder()
        if home is None:
            raise RuntimeError(MISSING)
        suffix = "dylib" if sys.platform == "darwin" else "so"
        self._libraries = [
            ctypes.CDLL(str(home / "lib" / f"lib{name}.{suffix}"), mode=ctypes.RTLD_GLOBAL)
            for name in ("ggml-base", "ggml-cpu", "ggml")
        ]
        for name, (result, arguments) in _SIGNATURES.items():
            function = next(getattr(lib, name) for lib in self._libraries if hasattr(lib, name))
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        self.backend = self.backend_cpu_init()
        self.host = self.backend_cpu_buffer_type()
        self.repack = self._repack_buffers()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def _repack_buffers(self) -> int:
        registry = self.backend_dev_backend_reg(self.backend_get_device(self.backend))
        address = self.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if address:
            listed = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)
            types = listed(self.backend_get_device(self.backend))
            for i in range(16):
                if not types or not types[i]:
                    break
                if b"REPACK" in self.backend_buft_name(types[i]):
                    return types[i]
        raise RuntimeError("this build of llama.cpp has no repacked buffers; it was not built for this processor")

    def threads(self, count: int) -> None:
        self.backend_cpu_set_n_threads(self.backend, count)


class GgmlProduct:
    """y = W x for one token, W (rows, columns) of a ggml type."""

    def __init__(self, ggml: Ggml, kind: str, weight: np.ndarray) -> None:
        """weight (rows, columns) float32."""
        self._ggml = ggml
        rows, columns = weight.shape
        self.rows, self.columns = rows, columns
        params = _InitParams(ggml.tensor_overhead() * 64 + ggml.graph_overhead() * 4, None, True)
        weights, rest = ggml.init(params), ggml.init(params)
        w = ggml.new_tensor_2d(weights, TYPES[kind], columns, rows)
        self._x = ggml.new_tensor_2d(rest, 0, columns, 1)
        buffer = ggml.backend_alloc_ctx_tensors_from_buft(weights, ggml.repack)
        if not buffer:
            raise MemoryError(f"no room for {rows} x {columns} in {kind}")
        ggml.backend_buffer_set_usage(buffer, 1)  # weights
        _huge_pages(ggml.backend_buffer_get_base(buffer), ggml.backend_buffer_get_size(buffer))
        self.nbytes = ggml.row_size(TYPES[kind], columns) * rows
        codes = np.empty(self.nbytes, np.uint8)
        weight = np.ascontiguousarray(weight, np.float32)
        ggml.quantize_chunk(TYPES[kind], weight.ctypes.data, codes.ctypes.data, 0, rows, columns, None)
        ggml.backend_tensor_set(w, codes.ctypes.data, 0, self.nbytes)
        self._y = ggml.mul_mat(rest, w, self._x)
        ggml.backend_alloc_ctx_tensors_from_buft(rest, ggml.host)
        self._graph = ggml.new_graph(rest)
        ggml.build_forward_expand(self._graph, self._y)

    def set(self, x: np.ndarray) -> None:
        """x (columns,) float32."""
        x = np.ascontiguousarray(x, np.float32)
        assert x.shape == (self.columns,)
        self._ggml.backend_tensor_set(self._x, x.ctypes.data, 0, x.nbytes)

    def run(self) -> None:
        self._ggml.backend_graph_compute(self._ggml.backend, self._graph)

    def get(self) -> np.ndarray:
        """y (rows,) float32."""
        y = np.empty(self.rows, np.float32)
        self._ggml.backend_tensor_get(self._y, y.ctypes.data, 0, y.nbytes)
        return y


def _huge_pages(base: int, size: int) -> None:
    """The pages our own weights lie in, for theirs as well: 4 KiB pages would make this comparison unfair."""
    if not sys.platform.startswith("linux"):
        return
    start = (base + 4095) & ~4095
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t((base + size - start) & ~4095), 14)


class Worker:
    """A model in llama.cpp, in a process of its own that waits between commands. Its weights lie in huge pages, as ours
    do, where the system has them: `huge_bytes`."""

    def __init__(self, model: Path, *, context: int, threads: int) -> None:
        script = Path(__file__).with_name("_llama_worker.py")
        self._process = subprocess.Popen(
            [str(python()), str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},  # what malloc maps, madvised
        )
        told = self._ask({"load": str(model), "context": context, "threads": threads})
        self.vocabulary: int = told["vocabulary"]
        self.huge_bytes: int = told["huge_bytes"]

    def prompt(self, tokens: list[int]) -> float:
        """Seconds to read a prompt from an empty cache."""
        return self._ask({"prompt": tokens})["seconds"][0]

    def write(self, tokens: int) -> list[float]:
        """Seconds of each of so many greedy tokens."""
        return self._ask({"write": tokens})["seconds"]

    def greedy(self, prompt: list[int], tokens: int) -> list[int]:
        """So many greedy tokens behind a prompt."""
        self.prompt(prompt)
        return self._ask({"write": tokens})["tokens"]

    def logits(self, tokens: list[int]) -> np.ndarray:
        """(tokens, vocabulary) float32 behind every token of a text."""
        with tempfile.TemporaryDirectory() as folder:
            to = Path(folder) / "logits.npy"
            self._ask({"logits": tokens, "to": str(to)})
            return np.load(to)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, command: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"llama.cpp ended with {self._process.wait()} at {list(command)}")
        return json.loads(line)


def write_gguf(folder: Path, out: Path, kind: str, ggml: Ggml) -> Path:
    """A model folder as a GGUF file, every matrix in one tensor type, quantised by ggml itself. Made once."""
    if out.exists():
        return out
    import gguf

    sys.path.insert(0, str(_bench.REPOSITORY))
    from tests.gguf_files import describe, interleaved

    from pennyweight.disk.checkpoint import Checkpoint

    checkpoint = Checkpoint(folder)
    config = checkpoint.config
    partial = out.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, config["model_type"], use_temp_file=True)
    describe(writer, folder, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[config["model_type"].upper()], config["num_hidden_layers"])
    for name in checkpoint.entries:
        weights, stored = checkpoint.read(name).float().numpy(), names.get_name(name, (".weight", ".bias")) or name
        if weights.ndim == 1:
            writer.add_tensor(stored, weights)
            continue
        if config["model_type"] == "llama" and (".q_proj." in name or ".k_proj." in name):
            key = "num_attention_heads" if ".q_proj." in name else "num_key_value_heads"
            weights = interleaved(weights, config[key])
        rows, columns = weights.shape
        weights = np.ascontiguousarray(weights)
        codes = np.empty((rows, ggml.row_size(TYPES[kind], columns)), np.uint8)
        ggml.quantize_chunk(TYPES[kind], weights.ctypes.data, codes.ctypes.data, 0, rows, columns, None)
        writer.add_tensor(stored, codes, raw_dtype=gguf.GGMLQuantizationType(TYPES[kind]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(out)
    return out
