"""The tokenizer of a model folder, its chat template, and the settings for sampling that came with it.

Tokenizers and templates are other people's programs. They are called here and nowhere else, so what they raise, which
may be anything, becomes a ValueError in one line.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field

from pennyweight.disk.reading import json_file, size_of
from pennyweight.disk.templates import Templates

GENERATION = "generation_config.json"
_SHOWN = 300
_VERSIONED = re.compile(r"tokenizer\..+\.json|tokenizer\.model.*|tekken\.json|tiktoken\.model")
"""What transformers looks for beside the names that a tokenizer's class gives."""
_LICENCE = re.compile(r"(licen[cs]e|notice|copying|use_policy)([._-].*)?", re.IGNORECASE)
_CODE = re.compile(r".*\.(py|so|bin|pt|pth|pkl|pickle|safetensors|gguf)", re.IGNORECASE)
_GIVEN = frozenset(("messages", "tools", "documents", "add_generation_prompt"))
"""What a template is told of the conversation itself; nobody may say otherwise."""


class Ends(BaseModel):
    """The tokens that end an answer, as config.json and generation_config.json name them."""

    eos_token_id: int | list[int] | None = None

    @property
    def ends(self) -> list[int]:
        named = [] if self.eos_token_id is None else self.eos_token_id
        return named if isinstance(named, list) else [named]


class GenerationConfig(Ends):
    """What is read of generation_config.json; None where it says nothing."""

    do_sample: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None


@dataclass(frozen=True)
class Vocabulary:
    """A transformers tokenizer, the tokens that it puts before plain text, those that end an answer, and how answers
    are drawn where nobody says otherwise."""

    tokenizer: Any
    begin: tuple[int, ...]
    stop: frozenset[int]
    defaults: GenerationConfig = field(default_factory=GenerationConfig)


def read_generation_config(model: Path) -> GenerationConfig:
    """A folder without the file says nothing. Raises ValueError for one that makes no sense."""
    path = model / GENERATION
    return json_file(path, GenerationConfig) if path.exists() else GenerationConfig()


def load_tokenizer(model: Path) -> Any:
    """Raises ValueError if the folder's tokenizer cannot be loaded without running code that lies beside it."""
    from transformers import AutoTokenizer

    def what(said: str) -> str:
        if "trust_remote_code" in said:
            return (
                f"{model} names a tokenizer that is Python code of its own (auto_map), which is not run; copy a "
                "tokenizer.json beside the weights and take auto_map out of tokenizer_config.json"
            )
        return (
            f"{model} has no tokenizer that transformers can load ({said[:_SHOWN]}); copy tokenizer.json beside the "
            "weights. If it is there, it may be newer than the installed transformers and tokenizers"
        )

    with _theirs(what):
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False, local_files_only=True)


def accompanying(folder: Path) -> list[str]:
    """Names of the files that belong to a model beside its config and weights: all that transformers reads for its
    tokenizer, its chat templates and its way of generating, and its licences; nothing that can be run.

    Raises ValueError if the folder's tokenizer cannot be loaded or one of its files is not an ordinary file.
    """
    from transformers import tokenization_utils_base as base
    from transformers.utils import FEATURE_EXTRACTOR_NAME, GENERATION_CONFIG_NAME, PROCESSOR_NAME, hub

    names = {
        base.ADDED_TOKENS_FILE,
        base.SPECIAL_TOKENS_MAP_FILE,
        base.TOKENIZER_CONFIG_FILE,
        base.FULL_TOKENIZER_FILE,
        hub.CHAT_TEMPLATE_FILE,
        hub.LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
        GENERATION_CONFIG_NAME,
        PROCESSOR_NAME,
        FEATURE_EXTRACTOR_NAME,
        *load_tokenizer(folder).vocab_files_names.values(),
    }
    found = [
        path.name
        for path in sorted(folder.iterdir())
        if not path.is_dir()
        and (path.name in names or _VERSIONED.fullmatch(path.name) or _LICENCE.fullmatch(path.name))
    ]
    found += [
        f"{hub.CHAT_TEMPLATE_DIR}/{path.name}" for path in sorted((folder / hub.CHAT_TEMPLATE_DIR).glob("*.jinja"))
    ]
    found = [name for name in found if not _CODE.fullmatch(name)]
    for name in found:
        size_of(folder / name)
    return found


def encode(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, nothing added. Raises ValueError for what is no text or no text to this tokenizer."""
    try:
        text.encode()
    except UnicodeEncodeError as err:
        raise ValueError(f"the text is not Unicode: character {err.start} is half a pair or a stray byte") from None
    with _theirs(lambda said: f"the tokenizer cannot read this text: {said[:_SHOWN]}"):
        return list(tokenizer.encode(text, add_special_tokens=False))


def added(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer by its own rule puts before and after a text; many put none, and merely name a BOS."""
    with _theirs(lambda said: f"the tokenizer cannot read a letter: {said[:_SHOWN]}"):
        bare, whole = (list(tokenizer.encode("a", add_special_tokens=add)) for add in (False, True))
    at = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)
    return whole[:at], whole[at + len(bare) :]


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """The tokens that are not text, by id: decoding leaves them out."""
    return {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def converse(
    tokenizer: Any, templates: Templates, messages: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]
) -> str:
    """A conversation as the chat template writes it, up to where the model answers. `arguments` are further variables
    of the template. Raises ValueError in the template's words, or if it cannot be used."""
    taken = sorted(_GIVEN & arguments.keys())
    if taken:
        raise ValueError(f"{taken[0]} cannot be an argument of the chat template: the request itself says it")
    with _theirs(lambda said: f"the chat template cannot be used: {said[:_SHOWN]}"):
        template, names = tokenizer.get_chat_template(), dict(tokenizer.special_tokens_map)
    given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
    return templates.render(template, {**names, **arguments, **given})


@contextlib.contextmanager
def _theirs(what: Callable[[str], str]) -> Iterator[None]:
    """Other people's code: whatever it raises becomes a ValueError, of which `what` makes a sentence."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as err:  # a panic in Rust is no Exception
        raise ValueError(what(" ".join((str(err) or type(err).__name__).split()))) from err
