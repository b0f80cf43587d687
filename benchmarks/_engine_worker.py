"""One version of the engine in a process of its own: `python _engine_worker.py FOLDER MODEL THREADS LENGTH`.

FOLDER holds the package to import instead of the installed one; "" takes that. Reads commands as JSON lines: {"steps":
n} answers with the seconds of n decode steps after a text of LENGTH tokens, {"logits": ids} with a digest of the
logits after each of these tokens, read in one go and one by one.
"""

import hashlib
import importlib.machinery
import json
import sys
import time
from pathlib import Path


def main() -> None:
    folder, model, threads, length = sys.argv[1:]
    if folder:  # finders of editable installs come before every path
        machinery = importlib.machinery
        sys.meta_path[:] = [machinery.BuiltinImporter, machinery.FrozenImporter, machinery.PathFinder]
        sys.path.insert(0, folder)
    from pennyweight.runtime import engine as module

    assert not folder or Path(folder) in Path(module.__file__).parents, module.__file__
    engine = module.Engine(Path(model), context=int(length) + 1, threads=int(threads))
    sequence = engine.open(int(length) + 1)
    engine.fill(sequence, int(length))
    step = [module.Row(sequence, int(length), 1, sparse=True)]
    print(json.dumps({"package": module.__file__}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if "logits" in asked:
            digest = hashlib.sha256(engine.logits(asked["logits"]).tobytes())
            other = engine.open(int(length) + 1)
            for i, token in enumerate(asked["logits"]):
                digest.update(engine.step([module.Row(other, i, token)]).tobytes())
            engine.close(other)
            answer = {"digest": digest.hexdigest()}
        else:
            seconds = []
            for _ in range(asked["steps"]):
                started = time.perf_counter()
                engine.step(step)
                seconds.append(time.perf_counter() - started)
            answer = {"seconds": seconds}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
