"""Train a small reference model from a recipe: an ordinary transformers model and its own BPE tokenizer.

For experiments that need a real language model nobody has to download. Hidden weights are trained by Muon
(orthogonalised momentum, Jordan et al. 2024; torch's implementation), embeddings and norms by AdamW, on a
warmup-stable-decay schedule. Which rows make up step s depends only on the seed and s, so a run stopped at any
moment goes on from its last checkpoint.

Text is named in the recipe by title and SHA-256 and is never copied into the result.
"""

from __future__ import annotations

import functools
import hashlib
import json
import lzma
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from pennyweight import texts
from pennyweight.disk import places
from pennyweight.disk.writer import write_atomic
from pennyweight.evals.loss import loss
from pennyweight.heal import loop
from pennyweight.runs.events import Listener
from pennyweight.runs.lock import Lock

END_OF_TEXT = "<|endoftext|>"
# Words with one leading blank, single digits, punctuation, line ends, runs of blanks: prose and code alike.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Book(_Strict):
    """A text file `<title>.txt` or `<title>.txt.xz` in the books folder; sha256 of its uncompressed bytes."""

    title: str
    split: Literal["train", "held_out"]
    sha256: str


class Schedule(_Strict):
    """Learning rates in each optimiser's own units; tokens are targets seen, over all epochs."""

    tokens: int
    batch_rows: int
    warmup_tokens: int
    decay_share: float
    muon_lr: float
    adamw_lr: float
    weight_decay: float
    compile: bool = False


class Recipe(_Strict):
    kind: Literal["train"]
    seed: int
    model: dict[str, Any]
    vocab_size: int
    context: int
    schedule: Schedule
    eval_rows: int
    books: tuple[Book, ...]


def train(recipe: Recipe, *, books: Path, out: Path, listen: Listener, checkpoint_s: float = 180.0) -> Path:
    """Train, or go on training, in folder `out`; returns the Hugging Face folder out/model (bf16).

    Raises FileNotFoundError or ValueError if a book of the recipe is missing or differs, ValueError if `out` holds
    another recipe's run, Held if another process works on it.
    """
    places.apart(out, "--out", {"the books": books})
    places.begun(out, "run.json")
    documents = read_documents(recipe, books)
    with Lock(out):
        return _train(recipe, documents, out, listen, checkpoint_s)


def _train(
    recipe: Recipe, documents: dict[str, list[texts.Document]], out: Path, listen: Listener, checkpoint_s: float
) -> Path:
    _claim(out, recipe, documents)
    tokenizer = _tokenizer(recipe, documents["train"], out)
    ids = _token_file(tokenizer, documents["train"], out, recipe.context)
    held_out = {
        "books": texts.rows(documents["held_out_books"], tokenizer, recipe.context).take(recipe.eval_rows),
        "code": texts.rows(texts.stdlib(held_out=True), tokenizer, recipe.context).take(recipe.eval_rows),
    }

    torch.manual_seed(recipe.seed)
    config = AutoConfig.for_model(**recipe.model, vocab_size=recipe.vocab_size, max_position_embeddings=recipe.context)
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    optimizers = _optimizers(model, recipe.schedule)
    named = dict(model.named_parameters())
    done = _resume(out, named, optimizers)
    body, head = model.base_model, model.get_output_embeddings()
    body = torch.compile(body) if recipe.schedule.compile else body

    plan = recipe.schedule
    rows_per_epoch = (len(ids) - 1) // recipe.context
    tokens_per_step = plan.batch_rows * recipe.context
    steps = plan.tokens // tokens_per_step
    curve = [point for point in _curve(out) if point["step"] <= done]  # a point may be younger than the checkpoint

    def nats(step: int) -> torch.Tensor:
        batch = torch.from_numpy(_batch(ids, recipe, step, rows_per_epoch))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = head(body(input_ids=batch[:, :-1], use_cache=False).last_hidden_state)
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    def hear(step: int, loss: torch.Tensor) -> None:
        if step % 10 == 0:
            listen.advance(step, train_nats=float(loss))
        if step % 250 == 0 or step == steps:
            point = {"step": step, "tokens": step * tokens_per_step, "train_nats": float(loss)}
            point |= {f"{name}_bits_per_byte": _bits_per_byte(model, rows) for name, rows in held_out.items()}
            curve.append(point)
            write_atomic(out / "curve.jsonl", "".join(json.dumps(each) + "\n" for each in curve).encode())
            listen.advance(step, **{k: v for k, v in point.items() if k.endswith("byte")})

    def save(step: int) -> None:
        temporary = out / "checkpoint.partial"
        save_file(loop.state(named, optimizers), temporary, metadata={"step": str(step)})
        temporary.replace(out / "checkpoint.safetensors")

    listen.begin("train", total=steps, done=done, unit="steps")
    model.train()
    loop.run(
        nats,
        model.parameters(),
        optimizers,
        steps=steps,
        rate=lambda step: _lr_factor(step * tokens_per_step, plan),
        first=done,
        hear=hear,
        save=save,
        save_every_s=checkpoint_s,
    )
    listen.end()
    return _finish(out, recipe, documents, model, tokenizer, rows_per_epoch * recipe.context)


def _bits_per_byte(model: Any, rows: texts.Rows) -> float:
    model.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(model, rows).bits_per_byte
    model.train()
    return value


def read_documents(recipe: Recipe, books: Path) -> dict[str, list[texts.Document]]:
    """{"train": books and standard library, "held_out_books": the recipe's held-out books}, hashes checked."""
    held_out, train = [], []
    for book in recipe.books:
        document = texts.Document(f"books/{book.title}", _read_book(books, book))
        (train if book.split == "train" else held_out).append(document)
    return {"train": train + list(texts.stdlib(held_out=False)), "held_out_books": held_out}


def _read_book(folder: Path, book: Book) -> str:
    for path, read in (
        (folder / f"{book.title}.txt.xz", lambda p: lzma.decompress(p.read_bytes())),
        (folder / f"{book.title}.txt", lambda p: p.read_bytes()),
    ):
        if path.exists():
            raw = read(path)
            found = hashlib.sha256(raw).hexdigest()
            if found != book.sha256:
                raise ValueError(f"{path} has SHA-256 {found}; the recipe was made with {book.sha256}")
            return texts.strip_gutenberg(raw.decode("utf-8"))
    raise FileNotFoundError(f"{folder} holds neither {book.title}.txt nor {book.title}.txt.xz, which the recipe names")


def _claim(out: Path, recipe: Recipe, documents: dict[str, list[texts.Document]]) -> None:
    identity = {
        "recipe": recipe.model_dump(mode="json"),
        "train_text": texts.fingerprint(documents["train"]),
    }
    path = out / "run.json"
    if path.exists():
        if json.loads(path.read_text()) != identity:
            raise ValueError(f"{out} holds a run of another recipe or text; choose another --out or delete it")
        return
    write_atomic(path, json.dumps(identity, indent=1).encode())


def _tokenizer(recipe: Recipe, documents: list[texts.Document], out: Path) -> PreTrainedTokenizerFast:
    path = out / "tokenizer.json"
    if not path.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=recipe.vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator((document.text for document in documents), trainer)
        write_atomic(path, tokenizer.to_str().encode())
    return PreTrainedTokenizerFast(
        tokenizer_file=str(path),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=recipe.context,
    )


def _token_file(tokenizer: Any, documents: list[texts.Document], out: Path, context: int) -> np.ndarray:
    """All training tokens, a separator before each document, as one memory-mapped uint16 array."""
    path = out / "train.tokens.npy"
    if not path.exists():
        parts = []
        for document in documents:
            parts.append(np.asarray([texts.separator_id(tokenizer)], np.uint16))
            encoded = tokenizer.backend_tokenizer.encode(document.text, add_special_tokens=False)
            parts.append(np.asarray(encoded.ids, np.uint16))
        temporary = path.with_name("partial.tokens.npy")
        np.save(temporary, np.concatenate(parts))
        temporary.replace(path)
    return np.load(path, mmap_mode="r")


def _batch(ids: np.ndarray, recipe: Recipe, step: int, rows_per_epoch: int) -> np.ndarray:
    """Rows of step `step`: every epoch visits all rows once, in an order of its own. (batch_rows, context + 1)."""
    first = step * recipe.schedule.batch_rows
    picked = []
    for position in range(first, first + recipe.schedule.batch_rows):
        epoch, index = divmod(position, rows_per_epoch)
        row = _permutation(recipe.seed, epoch, rows_per_epoch)[index]
        picked.append(ids[row * recipe.context : (row + 1) * recipe.context + 1])
    return np.stack(picked).astype(np.int64)


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def _lr_factor(tokens: int, plan: Schedule) -> float:
    """Warmup-stable-decay: linear up, flat, then linear to zero over the last `decay_share` of the tokens."""
    up = min(1.0, (tokens + 1) / max(1, plan.warmup_tokens))
    down = (plan.tokens - tokens) / max(1.0, plan.decay_share * plan.tokens)
    return max(0.0, min(up, down))


def _optimizers(model: Any, plan: Schedule) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for everything else."""
    outside = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    hidden = [p for p in model.parameters() if p.ndim == 2 and id(p) not in outside]
    rest = [p for p in model.parameters() if p.ndim != 2 or id(p) in outside]
    muon = torch.optim.Muon(hidden, lr=plan.muon_lr, momentum=0.95, weight_decay=plan.weight_decay)
    adamw = torch.optim.AdamW(rest, lr=plan.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0)
    return [muon, adamw]


def _resume(out: Path, named: dict[str, Any], optimizers: list[torch.optim.Optimizer]) -> int:
    path = out / "checkpoint.safetensors"
    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as file:
        loop.restore({key: file.get_tensor(key) for key in list(file.keys())}, named, optimizers)
        return int(file.metadata()["step"])


def _curve(out: Path) -> list[dict[str, Any]]:
    path = out / "curve.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _finish(
    out: Path, recipe: Recipe, documents: dict[str, list[texts.Document]], model: Any, tokenizer: Any, epoch_tokens: int
) -> Path:
    folder = out / "model"
    model.to(torch.bfloat16).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    curve = _curve(out)
    provenance = {
        "recipe": recipe.model_dump(mode="json"),
        "parameters": sum(p.numel() for p in model.parameters()),
        "epoch_tokens": epoch_tokens,
        "train_text_sha256": texts.fingerprint(documents["train"]),
        "torch": torch.__version__,
        "texts": [
            {
                "name": document.name,
                "sha256": hashlib.sha256(document.text.encode()).hexdigest(),
                "bytes": len(document.text.encode()),
            }
            for document in documents["train"]
        ],
        "curve": curve,
    }
    write_atomic(folder / "provenance.json", json.dumps(provenance, indent=1).encode())
    return folder
