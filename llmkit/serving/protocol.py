"""OpenAI's API: request bodies as pydantic schemas, and errors.

read_body(CompletionBody, {"prompt": "a", "logit_bias": {"7": 5}})  ->  ApiError: 'logit_bias' must be {}
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from llmkit.config import LARGEST_INTEGER
from llmkit.io.records import kind_of

# fields of OpenAI and vLLM that are accepted with values that have no effect
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (True,),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "ignore_eos": (False,),
    "logit_bias": ({},),
    "metadata": ({},),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "store": (False,),
    "suffix": ("",),
}


class ApiError(Exception):
    """An error in OpenAI's format: HTTP status, message, the wrong field, and a code."""

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, kind)
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _as_list(value: Any) -> Any:
    """Wrap a single string or a single list of token ids in a list."""
    return [value] if isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int) else value


TokenIds = Annotated[list[int], Field(min_length=1)]
Texts = Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_as_list)]


class Schema(BaseModel):
    """An object with only the declared fields; values are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Body(Schema):
    """A request to a model. Null is a missing value, except in the fields `nullable`."""

    nullable: ClassVar[tuple[str, ...]] = ()
    model: str | None = None


class StreamOptions(Schema):
    """Options of a stream; obfuscation is accepted but not applied."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class GenerationBody(Body):
    """Fields that chat and text completions share."""

    n: int = Field(1, ge=1, le=128)
    seed: int | None = Field(None, ge=-(2**63), le=LARGEST_INTEGER)
    temperature: float = Field(1, ge=0, le=100)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    stop: Texts = Field([], max_length=16, description="at most 16 non-empty strings")
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    user: Any = None  # these three identify the user and are ignored
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise ApiError("'stream_options' requires 'stream' to be true", "stream_options")
        return self


class ChatTemplateKwargs(Schema):
    """Switches thinking on or off, under either of its names."""

    enable_thinking: bool | None = None
    thinking: bool | None = None


class ConversationBody(Body):
    """Fields that turn a conversation into a prompt."""

    messages: list[dict[str, Any]] = []
    tools: list[dict[str, Any]] = []
    tool_choice: Literal["auto", "none"] = "auto"
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: ChatTemplateKwargs = ChatTemplateKwargs()

    @model_validator(mode="after")
    def _check_end(self) -> ConversationBody:
        if self.continue_final_message and self.add_generation_prompt:
            raise ApiError("'continue_final_message' requires 'add_generation_prompt' to be false", "messages")
        return self


class JsonSchema(Schema):
    """A schema that the answer conforms to, strict or not."""

    of_answer: dict[str, Any] = Field(alias="schema")
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Schema):
    """Text, a JSON object, or JSON that conforms to a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ApiError(
                "'response_format': expected 'json_schema' exactly if type is json_schema", "response_format"
            )
        return self


class ChatBody(GenerationBody, ConversationBody):
    """`/v1/chat/completions`."""

    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    response_format: ResponseFormat = ResponseFormat(type="text")

    @property
    def alternatives(self) -> int | None:
        """The number of top alternatives per token; None if no log-probabilities are requested."""
        return self.top_logprobs if self.logprobs else None

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ApiError("'top_logprobs' requires 'logprobs' to be true", "top_logprobs")
        return self


class CompletionBody(GenerationBody):
    """`/v1/completions`."""

    prompt: Annotated[list[str | TokenIds], BeforeValidator(_as_list)] = Field(
        min_length=1, max_length=1024, description="text, token ids, or a list of 1 to 1024 of these"
    )
    add_special_tokens: bool = True
    max_tokens: int = Field(16, ge=0)
    echo: bool = False
    alternatives: int | None = Field(None, alias="logprobs", ge=0, le=20)

    @model_validator(mode="after")
    def _check_max_tokens(self) -> CompletionBody:
        if self.max_tokens == 0 and not self.echo:
            raise ApiError("'max_tokens' of 0 requires 'echo' to be true", "max_tokens")
        return self


class TokenizeBody(ConversationBody):
    """`/tokenize`, for a text (`prompt`) or a conversation."""

    prompt: str | None = Field(None, max_length=1 << 20, description="text of at most 1,048,576 characters")
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check_prompt(self) -> TokenizeBody:
        conversation = self.model_fields_set & ConversationBody.model_fields.keys() - {"model"}
        if self.prompt is not None and conversation:
            raise ApiError(f"'prompt' cannot be combined with {min(conversation)!r}", "prompt")
        if self.prompt is None and not self.messages:
            raise ApiError("expected 'prompt' or 'messages'", "prompt")
        return self


class DetokenizeBody(Body):
    """`/detokenize`."""

    tokens: TokenIds = Field(description="one or more token ids")
    return_token_strs: bool = False


AnyBody = TypeVar("AnyBody", bound=Body)


def read_body(schema: type[AnyBody], body: Any) -> AnyBody:
    """Validate a JSON object. Null means missing, except in `nullable` fields. Raises ApiError naming a wrong field."""
    if not isinstance(body, dict):
        raise ApiError(f"expected a JSON object, found {kind_of(body)}")
    fields = {
        name: value
        for name, value in body.items()
        if name in schema.nullable
        or (value is not None and (name in schema.model_fields or value not in NEUTRAL.get(name, ())))
    }
    try:
        return schema.model_validate(fields)
    except ValidationError as invalid:
        error = invalid.errors(include_url=False)[0]
    name, where = str(error["loc"][0]), ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        values = " or ".join(orjson.dumps(value).decode() for value in NEUTRAL.get(where, ()))
        reason = f"must be {values}" if values else "is not supported; omit it"
        raise ApiError(f"{where!r} {reason}", name, code="unsupported_parameter")
    if error["type"] == "missing":
        raise ApiError(f"{where!r}: expected a value, found none", name)
    field = schema.model_fields.get(name)
    if field is not None and field.description:
        raise ApiError(f"{name!r}: expected {field.description}", name)
    message = error["msg"].partition(" or instance of ")[0].replace("valid dictionary", "JSON object")
    found = f", found {kind_of(error['input'])}" if error["type"].endswith("_type") else ""
    raise ApiError(f"{where!r}: {message.replace('Input should be', 'expected')}{found}", name)
