"""Requests as OpenAI's clients send them, and what of them is not done here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pennyweight.serve.guard import invalid

_NOT_DONE = ("tools", "functions", "logprobs", "top_logprobs", "logit_bias", "echo", "suffix", "best_of")


class Ask(BaseModel):
    """Keys that both kinds of request share. The last three are extensions, named as vLLM names them."""

    model_config = ConfigDict(extra="allow")
    model: str = ""
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=8)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    response_format: dict[str, Any] | None = None
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=100)


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]]
    name: str | None = None


class Chat(Ask):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)


class Completion(Ask):
    prompt: str | list[str] | list[int] | list[list[int]]


def check(ask: Ask) -> None:
    """Raises Refused for what is asked for and not done."""
    for name in _NOT_DONE:
        if (ask.model_extra or {}).get(name):
            raise invalid(f"{name} is not supported by this server", name, "unsupported_parameter")
    for name in ("presence_penalty", "frequency_penalty"):
        if getattr(ask, name):
            raise invalid(f"{name} is not supported; repetition_penalty is", name, "unsupported_parameter")
    if ask.response_format not in (None, {"type": "text"}):
        raise invalid("only text can be asked for", "response_format", "unsupported_parameter")


def plain(message: Message) -> dict[str, str]:
    role = "system" if message.role == "developer" else message.role  # its newer name; templates know the older one
    if isinstance(message.content, str):
        return {"role": role, "content": message.content}
    if any(part.get("type") != "text" or not isinstance(part.get("text"), str) for part in message.content):
        raise invalid("only text content is supported", "messages", "unsupported_content")
    return {"role": role, "content": "".join(part["text"] for part in message.content)}
