"""Requests as OpenAI's clients send them.

The schema is closed: a key that is not known is refused by name, because an answer that silently is not what was asked
for is worse than none. What clients send without meaning anything by it is let through: null is absent, values that
switch off what is not done here are absent, and a few keys do not concern the answer.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema
from pydantic_core import from_json

from pennyweight.serve.guard import Limits, invalid, unsupported

_HARMLESS = frozenset(
    """
    user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention parallel_tool_calls
    cache_prompt keep_alive
    """.split()  # noqa: SIM905
)
_OFF: dict[str, tuple[Any, ...]] = {
    # OpenAI's
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "logit_bias": ({}, []),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    # vLLM's
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    # llama.cpp's and Ollama's
    "typical_p": (1,),
    "tfs_z": (1,),
    "mirostat": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "dynatemp_range": (0,),
    "top_n_sigma": (-1,),
    "repeat_last_n": (-1,),
    "penalize_nl": (False,),
    "min_keep": (0,),
    "n_keep": (0,),
    "n_probs": (0,),
    "id_slot": (-1,),
    "grammar": ("",),
    "json_schema": ({},),
    # Both: as if not said
    "top_k": (-1,),
    "seed": (-1,),
}
"""Values that say of something not done here that it is not wanted."""
_ALSO: dict[str, str] = {"repeat_penalty": "repetition_penalty", "n_predict": "max_tokens", "num_predict": "max_tokens"}
"""What llama.cpp and Ollama call the same things."""
_INSTEAD: dict[str, str] = dict.fromkeys(("presence_penalty", "frequency_penalty"), "; repetition_penalty is")
_AS_MANY_AS_FIT = 2**31 - 1
LARGE_BYTES = 2**16
"""Of a body that takes a while to read."""
_VALUES_OF_A_TOKEN, _OTHER_VALUES = 4, 4096
_TEXT_OR_COMMA = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|,', re.DOTALL)
_ONE_OR_SEVERAL = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
_IDS = {"type": "array", "items": {"type": "integer"}}
_PROMPT = {"anyOf": [*_ONE_OR_SEVERAL["anyOf"], _IDS, {"type": "array", "items": _IDS}]}


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class StreamOptions(_Closed):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # against listeners on the line; nothing is hidden here


class Ask(_Closed):
    """Keys that both kinds of request share. The last seven are extensions, named as vLLM names them."""

    model: str = ""
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    n: int = Field(1, ge=1, le=8)
    seed: int | None = None
    stop: Annotated[list[str], WithJsonSchema(_ONE_OR_SEVERAL)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    stop_token_ids: list[int] = Field([], max_length=64)
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0)

    @property
    def most(self) -> int | None:
        """Tokens of an answer, None for as many as fit."""
        return self.max_tokens


class Message(_Closed):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]]
    name: str | None = None
    reasoning_content: str | None = None


class Chat(Ask):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)
    chat_template_kwargs: dict[str, Any] = {}

    @property
    def most(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class Completion(Ask):
    prompt: Annotated[Any, WithJsonSchema(_PROMPT)]

    @property
    def most(self) -> int | None:
        return self.max_tokens or 16


A = TypeVar("A", Chat, Completion)


def read(kind: type[A], body: bytes, limits: Limits, context: int) -> A:
    """A request. `context`: tokens a text may have. Raises Refused for what makes no sense or is not done, in little
    time: long lists are counted before anyone looks into them."""
    if len(body) > LARGE_BYTES:
        _count(body, _VALUES_OF_A_TOKEN * context + _OTHER_VALUES)
    try:
        given = from_json(body, allow_inf_nan=False)
    except ValueError as err:
        raise invalid(f"the body is not JSON: {err}") from err
    if not isinstance(given, dict):
        raise invalid("the body is not a JSON object")
    fields: dict[str, Any] = given
    asked: dict[str, Any] = {}
    for said, value in fields.items():
        if value is None or said in _HARMLESS or _off(said, value, fields):
            continue
        name = _ALSO.get(said, said)
        if name not in kind.model_fields:
            raise unsupported(said, _INSTEAD.get(said, ""))
        if name in asked:
            raise invalid(f"{said} and {name} say the same thing; send one of them", said)
        asked[name] = _AS_MANY_AS_FIT if name == "max_tokens" and value == -1 else value
    if "stop" in asked:
        asked["stop"] = _stops(asked["stop"], limits)
    if isinstance(asked.get("messages"), list):
        asked["messages"] = _messages(asked["messages"], context)
    try:
        return kind.model_validate(asked)
    except ValidationError as err:
        first = err.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise (
            unsupported(where) if first["type"] == "extra_forbidden" else invalid(f"{where}: {first['msg']}", where)
        ) from err


def _count(body: bytes, most: int) -> None:
    """Refuse a body of more than `most` values: a message has a few for each of its tokens at most. The parser keeps
    all threads waiting until it has made every one of a million objects; here they take turns, and a body that is
    mostly text passes in a moment."""
    for number, _ in enumerate(_TEXT_OR_COMMA.finditer(body)):  # of a value there is one of each at most
        if number == 2 * most:
            raise invalid(f"the body holds more than {most} values", code="too_many_values")


def _off(name: str, value: Any, given: dict[str, Any]) -> bool:
    return value in _OFF.get(name, ()) or (name == "best_of" and value == given.get("n"))


def _stops(given: Any, limits: Limits) -> list[str]:
    stops = [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops[: limits.stops]):
        raise invalid("stop: expected a text or a list of texts", "stop")
    if len(stops) > limits.stops or max(map(len, stops), default=0) > limits.stop_characters:
        said = f"stop: at most {limits.stops} texts of at most {limits.stop_characters} characters"
        raise invalid(said, "stop")
    return stops


def _messages(given: list[Any], context: int) -> list[Any]:
    """Without what is null: clients send back what they were sent. Every message takes a token at least."""
    if len(given) > context:
        said = f"{len(given)} messages, in a context of {context} tokens"
        raise invalid(said, "messages", "context_length_exceeded")
    absent = lambda one: {key: value for key, value in one.items() if value is not None}  # noqa: E731
    return [absent(one) if isinstance(one, dict) else one for one in given]


def prompts(given: Any, most: int) -> list[str | list[int]]:
    """The prompts of a request, at most `most`. Raises Refused."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list):
        raise invalid("prompt: expected a text, token ids, or a list of such", "prompt")
    if not given:
        raise invalid("prompt: the list is empty", "prompt", "empty_prompt")
    several: list[Any] = [given] if type(given[0]) is int else given
    if len(several) > most:
        raise invalid(f"prompt: {len(several)} texts; at most {most} at once", "prompt", "too_many_prompts")
    for one in several:
        if not isinstance(one, str) and not (isinstance(one, list) and all(type(token) is int for token in one)):
            raise invalid("prompt: expected a text, token ids, or a list of such", "prompt")
    return several


def plain(message: Message) -> dict[str, str]:
    """A message as templates know it."""
    told = message.model_dump(exclude_none=True)
    told["role"] = "system" if message.role == "developer" else message.role  # its newer name
    if not isinstance(message.content, str):
        if any(part.get("type") != "text" or not isinstance(part.get("text"), str) for part in message.content):
            raise invalid("only text content is supported", "messages", "unsupported_content")
        told["content"] = "".join(part["text"] for part in message.content)
    return told
