"""What is needed to reach a model over HTTP, at any endpoint that speaks OpenAI's chat completions.

The key is read from an environment variable or a file when a connection is opened, and stands in no
config, log, manifest or error message.
"""

import os
import re
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from candor.errors import UserError

_DATED = re.compile(r"-\d{4}-?\d{2}-?\d{2}|-\d{4}")  # gpt-4.1 answers as gpt-4.1-2025-04-14


def same_model(asked: str, told: str) -> bool:
    """Whether two names can be of one model: the same, or the second a dated version of the first."""
    return told == asked or (told.startswith(asked) and _DATED.fullmatch(told[len(asked) :]) is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a model answers, how fast it may be asked, and what is done when it fails."""

    url: str  # up to and without /chat/completions, e.g. https://api.openai.com/v1 or http://127.0.0.1:8000/v1
    key_env: str | None = "OPENAI_API_KEY"  # environment variable that holds the key
    key_file: Path | None = None  # or a file that holds nothing else; it comes before key_env
    concurrency: int = 32  # calls at a time
    requests_per_minute: float | None = None  # null: what the endpoint's headers say, if they say anything
    tokens_per_minute: float | None = None
    retries: int = 6  # of one call, after its first try
    timeout_s: float = 60.0  # of one try, from sending to the last byte
    backoff_s: float = 1.0  # before the first retry; doubles with each, and half of it is drawn at random
    max_wait_s: float = 120.0  # longest wait before a retry; an endpoint that asks for more stops the run
    max_body_bytes: int = 4_000_000  # a longer answer is cut off and counts as failed
    proxy: str | None = None  # null: HTTPS_PROXY and NO_PROXY of the environment; loopback never goes through one
    top_logprobs: int = 20  # alternatives asked for at every token; 0: the endpoint gives none
    limit_key: Literal["max_tokens", "max_completion_tokens"] = "max_completion_tokens"  # as the endpoint calls it
    extra_body: dict[str, Any] = field(default_factory=dict)  # sent with every call, e.g. provider routing
    # sent with a begun answer so that the model goes on from there (for numbers of several tokens); vLLM's is
    # {continue_final_message: true, add_generation_prompt: false}; null: the endpoint cannot
    continue_body: dict[str, Any] | None = None
    answers_as: tuple[str, ...] = ()  # other names under which the endpoint may say that this model answered

    def __post_init__(self) -> None:
        """Refuse what cannot be reached or means nothing."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"endpoint.url is {self.url!r}; it must look like https://api.openai.com/v1.")
        if parts.username or parts.password:
            raise UserError("endpoint.url holds a password; put the key into key_env or key_file.")
        if self.concurrency < 1 or self.retries < 0 or not 0 <= self.top_logprobs <= 20:
            raise UserError("endpoint: concurrency must be 1 or more, retries 0 or more, top_logprobs 0 to 20.")
        limits = (self.requests_per_minute or 1, self.tokens_per_minute or 1)
        if min(self.timeout_s, self.max_wait_s, self.max_body_bytes, *limits) <= 0 or self.backoff_s < 0:
            raise UserError("endpoint: timeouts, waits, sizes and rates must be above 0.")

    @property
    def loopback(self) -> bool:
        """Whether the endpoint is on this machine."""
        host = urlsplit(self.url).hostname or ""
        try:
            return ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"

    def read_key(self) -> str:
        """The key; UserError saying where it was looked for. An endpoint on this machine may go without."""
        if self.key_file is not None:
            try:
                key = self.key_file.read_text(encoding="utf-8").strip()
            except OSError as error:
                raise UserError(f"endpoint.key_file {self.key_file}: {error.strerror}.") from error
            except UnicodeDecodeError as error:
                raise UserError(f"endpoint.key_file {self.key_file} holds no text. Name the key file.") from error
            place = str(self.key_file)
        else:
            key = os.environ.get(self.key_env or "", "").strip()
            place = f"the environment variable {self.key_env}"
        if not key and self.loopback:
            return "none"
        if not key or not key.isascii() or any(c.isspace() for c in key):
            raise UserError(
                f"{place} holds no usable key for {self.url}. Set it, or name another with endpoint.key_env or "
                "endpoint.key_file."
            )
        return key

    def route(self) -> str | None:
        """The proxy to go through, or None for a direct connection."""
        if self.loopback:
            return None
        if self.proxy:
            return self.proxy
        parts = urlsplit(self.url)
        return None if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme)


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What an endpoint charges, in US dollars per million tokens."""

    input: float
    output: float
    batch: float = 0.5  # factor on both when calls go through the batch API

    def __post_init__(self) -> None:
        """Refuse negative prices."""
        if min(self.input, self.output, self.batch) < 0:
            raise UserError("price: input, output and batch must not be negative.")

    def of(self, input_tokens: float, output_tokens: float, *, batch: bool = False) -> float:
        """Dollars for so many tokens."""
        return (self.input * input_tokens + self.output * output_tokens) / 1e6 * (self.batch if batch else 1.0)
