"""Asking a model behind an OpenAI-compatible endpoint: retries, a rate, a cost known beforehand, and a cache."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lightning_sft import SFTError

if TYPE_CHECKING:
    from httpx2 import Client, Response

_CHARACTERS_PER_TOKEN = 4  # a rule of thumb for English
_LONGEST_WAIT = 600.0  # seconds that a Retry-After is waited for
_REFUSALS = {401, 403, 404, 405}
_BAD_REQUESTS = {400, 413, 422}  # too long, or filtered: others may be answered
_MOST_BAD = 3  # so many, and none answered, are a refusal of all


@dataclass
class Endpoint:
    """A model behind an OpenAI-compatible endpoint (`POST <base_url>/chat/completions`).

    Args:
        base_url: The address, such as https://api.openai.com/v1 or http://localhost:8000/v1.
        model: The model's name there.
        api_key_env: The environment variable that holds the API key; null where none is needed.
        max_tokens: Most tokens of a reply.
        temperature: 0 for the likeliest reply.
        timeout: Seconds to wait for a reply.
        retries: How often a request is sent again after a timeout, a lost connection, status 408, 409, 429 or 5xx, or
            a malformed reply.
        backoff: Seconds before the first of these; each later one waits twice as long, or as Retry-After says.
        concurrency: Requests at a time.
        requests_per_minute: Most requests a minute; null: no limit.
        price_input: What a million tokens sent cost.
        price_output: What a million tokens received cost.
        max_cost: Refuse to send requests that may cost more in all, in the currency of the prices.
        cache: A folder that keeps replies by their requests; null: none.
        body: Further fields of each request, which go over the others; null takes one out. For models that want
            no temperature: `{temperature: null, max_tokens: null, max_completion_tokens: 1024}`.
    """

    base_url: str
    model: str
    api_key_env: str | None = "OPENAI_API_KEY"
    max_tokens: int = 1024
    temperature: float = 0.0
    timeout: float = 120.0
    retries: int = 5
    backoff: float = 1.0
    concurrency: int = 4
    requests_per_minute: float | None = None
    price_input: float | None = None
    price_output: float | None = None
    max_cost: float | None = None
    cache: str | None = "runs/judge-cache"
    body: dict[str, Any] | None = None

    def check(self, where: str) -> None:
        """Whether the options make sense, and the API key is there.

        Raises:
            SFTError: One doesn't, or it isn't; says which.
        """
        if not _is_address(self.base_url):
            raise SFTError(
                f"base_url is {self.base_url!r}", where=f"{where}.base_url", fix="give http://… or https://…"
            )
        for name, least in (
            ("max_tokens", 1),
            ("concurrency", 1),
            ("retries", 0),
            ("backoff", 0),
            ("timeout", 0),
        ):
            if getattr(self, name) < least:
                raise SFTError(
                    f"{name} is {getattr(self, name)}", where=f"{where}.{name}", fix=f"give {least} or more"
                )
        if self.requests_per_minute is not None and self.requests_per_minute <= 0:
            raise SFTError(
                f"it is {self.requests_per_minute}",
                where=f"{where}.requests_per_minute",
                fix="give more than 0",
            )
        if self.max_cost is not None and (self.price_input is None or self.price_output is None):
            raise SFTError(
                "max_cost needs prices",
                where=where,
                fix="give price_input and price_output, per million tokens",
            )
        key = os.environ.get(self.api_key_env or "", "")
        if self.api_key_env is not None and not (key.strip() and key.strip().isascii()):
            raise SFTError(
                f"the environment variable {self.api_key_env} {'holds no key' if key else 'is not set'}",
                where=f"{where}.api_key_env",
                fix="put the API key into it; null where the endpoint needs none",
            )


@dataclass(frozen=True, slots=True)
class Estimate:
    """What requests may cost, before they are sent.

    Args:
        requests: How many are to be sent.
        cached: How many have a reply already.
        tokens_in: Tokens to send: characters / 4.
        tokens_out: Most tokens to receive.
        cost: At most, by the prices; None without.
    """

    requests: int
    cached: int
    tokens_in: int
    tokens_out: int
    cost: float | None

    def __str__(self) -> str:
        cost = "" if self.cost is None else f", at most {self.cost:.2f} by the given prices"
        return (
            f"{self.requests} requests to send ({self.cached} in the cache), about {self.tokens_in:,} tokens, at most "
            f"{self.tokens_out:,} back{cost}"
        )


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of one prompt.

    Args:
        text: The reply; None where there is none.
        failure: Why there is none.
    """

    text: str | None
    failure: str = ""


class _Refused(Exception):
    """The endpoint refuses a request: sending it again is of no use.

    Args:
        what: How.
        all: No other one will be answered either.
    """

    def __init__(self, what: str, all: bool) -> None:
        super().__init__(what)
        self.all = all


class _Failed(Exception):
    """A request failed; another attempt may not.

    Args:
        what: How.
        wait: How many seconds to wait at least.
    """

    def __init__(self, what: str, wait: float = 0.0) -> None:
        super().__init__(what)
        self.wait = wait


@dataclass
class Asker:
    """Sends prompts to an endpoint.

    Args:
        endpoint: Where to.
        name: Who asks, for messages.
    """

    endpoint: Endpoint
    name: str
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _next: float = 0.0
    _over: threading.Event = field(default_factory=threading.Event)
    _refusal: str = ""
    _bad: int = 0
    _answered: bool = False

    def estimate(self, prompts: Sequence[str]) -> Estimate:
        """What asking these may cost, each different one once."""
        unasked = [prompt for prompt in dict.fromkeys(prompts) if self._cached(prompt) is None]
        tokens_in = sum(len(prompt) for prompt in unasked) // _CHARACTERS_PER_TOKEN
        tokens_out = len(unasked) * self.endpoint.max_tokens
        cost = None
        if self.endpoint.price_input is not None and self.endpoint.price_output is not None:
            cost = (tokens_in * self.endpoint.price_input + tokens_out * self.endpoint.price_output) / 1e6
        return Estimate(len(unasked), len(set(prompts)) - len(unasked), tokens_in, tokens_out, cost)

    def ask(self, prompts: Sequence[str]) -> list[Reply]:
        """The reply to each prompt. Prints the estimate before anything is sent; nothing is for what is in the cache.

        Raises:
            SFTError: It may cost more than `max_cost`, or the endpoint refuses such requests.
        """
        estimate = self.estimate(prompts)
        print(f"{self.name}: {self.endpoint.model}: {estimate}")
        most = self.endpoint.max_cost
        if most is not None and estimate.cost is not None and estimate.cost > most:
            raise SFTError(
                f"the requests may cost {estimate.cost:.2f}, max_cost is {most:.2f}",
                where=f"{self.name}.endpoint.max_cost",
                fix="raise it, set `limit`, or lower max_tokens; the model's answers are kept",
            )
        found = {prompt: self._cached(prompt) for prompt in dict.fromkeys(prompts)}
        unasked = [prompt for prompt, reply in found.items() if reply is None]
        self._answered = len(unasked) < len(found)
        if unasked:
            from httpx2 import Client

            workers = ThreadPoolExecutor(self.endpoint.concurrency)
            with Client(timeout=self.endpoint.timeout) as client, workers as pool:
                try:
                    found.update(
                        zip(unasked, pool.map(lambda each: self._ask(client, each), unasked), strict=True)
                    )
                except BaseException:  # an interrupt, too: nothing more is sent
                    self._over.set()
                    raise
            if self._over.is_set():
                raise SFTError(
                    f"the endpoint refuses the request: {self._refusal}",
                    where=f"{self.name}.endpoint",
                    fix="check base_url, model and the API key; replies so far are in the cache",
                )
        return [found[prompt] or Reply(None) for prompt in prompts]

    def _ask(self, client: Client, prompt: str) -> Reply:
        """The reply after as many attempts as it takes, or as there may be."""
        for attempt in range(self.endpoint.retries + 1):
            self._wait_for_turn()
            if self._over.is_set():
                break
            try:
                text = self._send(client, prompt)
            except _Refused as refused:
                with self._lock:
                    self._bad += 1
                    if not refused.all and (self._answered or self._bad < _MOST_BAD):
                        return Reply(None, str(refused))
                self._refusal = str(refused)
                self._over.set()
            except _Failed as failed:
                if attempt == self.endpoint.retries or failed.wait > _LONGEST_WAIT:
                    return Reply(None, f"{failed}, {attempt + 1} attempts")
                self._pause(max(failed.wait, self.endpoint.backoff * 2**attempt))
            else:
                self._answered = True
                self._keep(prompt, text)
                return Reply(text)
        return Reply(None, "not asked")

    def _send(self, client: Client, prompt: str) -> str:
        from httpx2 import HTTPError

        headers = {}
        if self.endpoint.api_key_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.endpoint.api_key_env].strip()}"
        url = f"{self.endpoint.base_url.rstrip('/')}/chat/completions"
        try:
            response = client.post(url, json=self._body(prompt), headers=headers)
        except HTTPError as error:
            raise _Failed(type(error).__name__) from None
        if response.status_code in _REFUSALS | _BAD_REQUESTS:
            what = f"status {response.status_code}: {self._shown(response.text)}"
            raise _Refused(what, all=response.status_code in _REFUSALS)
        if response.status_code != 200:
            raise _Failed(f"status {response.status_code}", _retry_after(response))
        try:
            text = response.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            text = None
        if not isinstance(text, str):
            raise _Failed("a malformed reply")
        return text

    def _shown(self, text: str) -> str:
        """The beginning of what an endpoint says, without the key, should it repeat it."""
        key = os.environ.get(self.endpoint.api_key_env or "", "").strip()
        return (text.replace(key, "…") if key else text)[:200]

    def _body(self, prompt: str) -> Mapping[str, object]:
        body = {
            "model": self.endpoint.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": self.endpoint.temperature,
            "max_tokens": self.endpoint.max_tokens,
            **(self.endpoint.body or {}),
        }
        return {name: value for name, value in body.items() if value is not None}

    def _wait_for_turn(self) -> None:
        """Wait until the next request may be sent, by the rate and by what other requests were told."""
        rate = self.endpoint.requests_per_minute
        while True:
            with self._lock:
                wait = self._next - time.monotonic()
                if wait <= 0:
                    self._next = time.monotonic() + (60 / rate if rate else 0.0)
                    return
            if self._sleep(wait):
                return

    def _sleep(self, seconds: float) -> bool:
        """Wait; True as soon as there is nothing left to wait for."""
        return self._over.wait(seconds)

    def _pause(self, seconds: float) -> None:
        """Nothing is sent for so long."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)

    def _place(self, prompt: str) -> Path | None:
        if self.endpoint.cache is None:
            return None
        asked = json.dumps([self.endpoint.base_url, self._body(prompt)], sort_keys=True)
        key = hashlib.sha256(asked.encode()).hexdigest()[:32]
        return Path(self.endpoint.cache).expanduser() / key[:2] / f"{key}.json"

    def _cached(self, prompt: str) -> Reply | None:
        path = self._place(prompt)
        try:
            return Reply(str(json.loads(path.read_text(encoding="utf-8"))["reply"])) if path else None
        except (OSError, ValueError, LookupError):
            return None

    def _keep(self, prompt: str, reply: str) -> None:
        path = self._place(prompt)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{threading.get_ident()}.partial")
            told = {"base_url": self.endpoint.base_url, "request": self._body(prompt), "reply": reply}
            partial.write_text(json.dumps(told, ensure_ascii=False) + "\n", encoding="utf-8")
            partial.replace(path)


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of a port that is no number
        return False


def _retry_after(response: Response) -> float:
    """Seconds until another attempt may be made, as the endpoint says: a number or a date; 0 if it doesn't."""
    told = response.headers.get("Retry-After", "")
    try:
        return max(0.0, float(told))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(told) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0
