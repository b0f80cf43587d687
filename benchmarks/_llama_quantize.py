"""llama.cpp's own quantiser, in an interpreter that has llama-cpp-python: `_llama_quantize.py IN OUT TYPE IMATRIX`.

TYPE: a number of llama_ftype; IMATRIX: a .npz of mean squares of what every matrix multiplies, by the name of its
tensor, as llama-imatrix computes them. Says its seconds as JSON.
"""

import ctypes
import json
import sys
import time

import llama_cpp  # pyright: ignore[reportMissingImports]
import numpy as np


def main() -> None:
    source, out, kind, importance = sys.argv[1:]
    llama_cpp.llama_backend_init()
    with np.load(importance) as found:
        values = {name.encode(): np.ascontiguousarray(found[name], np.float32) for name in found.files}
    data = (llama_cpp.llama_model_imatrix_data * (len(values) + 1))()  # ends with a name that is null
    for entry, (name, each) in zip(data, values.items(), strict=False):
        entry.name, entry.size = name, each.size
        entry.data = each.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.imatrix = int(kind), 2, data
    started = time.perf_counter()
    if llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params)):
        raise SystemExit(f"llama.cpp does not quantise {source} to {kind}")
    print(json.dumps({"seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main()
