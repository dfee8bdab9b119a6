"""What can be configured: the engine of one plan, and the defaults that an operator sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator

ENGINE: Final = "openai_engine"
OPENAI_URL: Final = "https://api.openai.com/v1"
DEFAULT_TOOLS = ("calculator", "clock", "search_document")

OVERRIDABLE: dict[str, dict[str, Any]] = {
    "model": {"type": "string", "minLength": 1, "maxLength": 256},
    "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "max_tokens": {"type": "integer", "minimum": 1, "maximum": 10_000_000},
    "reasoning_effort": {"type": "string", "enum": ["none", "minimal", "low", "medium", "high", "xhigh"]},
    "seed": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
}
"""What one request may set, as JSON schema; address, key and limits stay with the operator."""


class _Options(BaseModel):
    """What a provider is asked for, and the limits under which. Frozen; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, use_attribute_docstrings=True)

    model: str = Field(default="gpt-4o-mini", min_length=1)
    """Name of the model, as the provider spells it."""
    temperature: float | None = Field(default=None, ge=0, le=2)
    """Sampling temperature; none: the provider's default."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Nucleus sampling; none: the provider's default."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Most tokens of one answer; none: the provider's default."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] | None = None
    """Name under which max_tokens is sent; none: max_completion_tokens to OpenAI, else max_tokens."""
    reasoning_effort: str | None = None
    """How much a reasoning model thinks; none: not sent."""
    seed: int | None = None
    """Sampling seed; none: not sent."""
    include_usage: bool = True
    """Ask for token counts (stream_options.include_usage); off for providers that refuse the field."""
    think_tags: bool = True
    """Take <think>…</think> at the start of an answer for reasoning."""
    connect_timeout_s: float = Field(default=10.0, gt=0)
    """Seconds to wait for a connection."""
    idle_timeout_s: float = Field(default=150.0, gt=0)
    """Seconds without a byte after which an answer is given up. First tokens after 66 to 100 s are real."""
    max_event_bytes: int = Field(default=4 * 1024 * 1024, ge=1024)
    """Largest event of the stream, in bytes; a larger one fails the run."""
    max_connections: int = Field(default=200, ge=1)
    """Most connections to the provider at once; further runs wait up to connect_timeout_s."""
    trust_env: bool | None = None
    """Use HTTP_PROXY, NO_PROXY and SSL_CERT_FILE; none: yes, except for a provider on this machine."""
    extra_headers: dict[str, str] = Field(default_factory=dict, repr=False)
    """HTTP headers to add to each request; treated as secret, since some providers take their key in one."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Fields to add to the body of each request, over those made here ({"reasoning": {"effort": "low"}})."""

    @field_validator("extra_body")
    @classmethod
    def _usable_body(cls, value: dict[str, Any]) -> dict[str, Any]:
        choices = value.get("n", 1)
        if not isinstance(choices, int) or choices < 1:
            raise ValueError("n must be a whole number of answers, 1 or more")
        if not value.get("stream", True):
            raise ValueError("stream cannot be switched off")
        return value


class EngineConfig(_Options):
    """The configuration of one engine, as it stands in `EnginePlan.config`."""

    base_url: str = OPENAI_URL
    """Address below which the provider serves /chat/completions."""
    api_key: SecretStr | None = Field(default=None, repr=False)
    """Sent as a bearer token; none: no Authorization header (local servers)."""

    @field_validator("base_url")
    @classmethod
    def _usable_url(cls, value: str) -> str:
        value = value.strip().rstrip("/")
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be an http:// or https:// address, for example https://api.openai.com/v1")
        if parts.username or parts.password:
            raise ValueError("must hold no user name or password; the key goes into OPENAI_API_KEY")
        if parts.query or parts.fragment:
            raise ValueError("must have no query and no fragment: /chat/completions is appended to it")
        return value

    @field_validator("api_key")
    @classmethod
    def _usable_key(cls, value: SecretStr | None) -> SecretStr | None:
        """A key read from a file often ends in a line feed.

        Anything else that is no header value is a mistake.
        """
        if value is None:
            return None
        key = value.get_secret_value().strip()
        if not (key.isascii() and key.isprintable()):
            raise ValueError("must be printable ASCII without line breaks (the value is not shown)")
        return SecretStr(key) if key else None

    @property
    def host(self) -> str:
        """The provider's host name."""
        return urlsplit(self.base_url).hostname or ""

    @property
    def uses_environment(self) -> bool:
        """Whether the proxy settings of the environment apply.

        A proxy cannot reach this machine's loopback address.
        """
        if self.trust_env is not None:
            return self.trust_env
        return not (self.host == "localhost" or self.host == "::1" or self.host.startswith("127."))


class OpenAISettings(_Options):
    """Settings of the plugin, read from `BROKER_PLUGIN_OPENAI_ENGINE_*`.

    The defaults of its one engine profile.
    """

    base_url: str | None = None
    """Address below which the provider serves /chat/completions; none: that of OPENAI_BASE_URL."""
    api_key: SecretStr | None = Field(default=None, repr=False)
    """The provider's key; none: that of OPENAI_API_KEY."""
    system_prompt: str | None = None
    """System prompt of the profile; none: no system message."""
    tools: tuple[str, ...] = DEFAULT_TOOLS
    """Names of the tools offered to the model, as a JSON list; [] for none."""
    priority: int = 10
    """Rank among engine profiles; the highest is the server's default."""

    def engine_config(self, environ: Mapping[str, str]) -> EngineConfig | None:
        """Return the engine's config, None if no provider is named, neither by address nor by key.

        Raises pydantic.ValidationError for an address or a key that cannot be used.
        """
        key = self.api_key.get_secret_value() if self.api_key else environ.get("OPENAI_API_KEY", "").strip()
        url = self.base_url or environ.get("OPENAI_BASE_URL", "").strip()
        if not (key or url):
            return None
        options = self.model_dump(include=set(_Options.model_fields))
        return EngineConfig(**options, base_url=url or OPENAI_URL, api_key=SecretStr(key) if key else None)
