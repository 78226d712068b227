"""Log-probabilities of given tokens from vLLM's OpenAI server, which gives them for prompts.

Part of the one place that speaks HTTP (serve/client.py).
"""

from collections.abc import Sequence

import openai

from candor.errors import UserError
from candor.rows import Option
from serve.engine import OptionScores, Reply, Request


def is_up(url: str, key: str) -> bool:
    """Whether a server answers at this address."""
    try:
        openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=5.0).models.list()
    except openai.AuthenticationError as error:
        raise UserError(f"{url} is another server: it does not take this run's key. Choose another port.") from error
    except openai.APIError:
        return False
    return True


class RemoteLogprobs:
    """The part of an engine that attestation needs, over HTTP."""

    def __init__(self, url: str, key: str, model: str, weights_sha: str) -> None:
        self.weights_sha = weights_sha
        self._client = openai.OpenAI(base_url=url, api_key=key, timeout=600.0)
        self._model = model

    def token_logprobs(self, sequences: Sequence[list[int]], starts: Sequence[int]) -> list[list[float]]:
        """Log-probabilities of each sequence's tokens from ``start`` on."""
        found = []
        for ids, start in zip(sequences, starts, strict=True):
            answer = self._client.completions.create(
                model=self._model, prompt=list(ids), max_tokens=1, temperature=0.0, extra_body={"prompt_logprobs": 0}
            )
            listed = answer.choices[0].model_dump()["prompt_logprobs"]
            found.append([float(listed[i][str(ids[i])]["logprob"]) for i in range(start, len(ids))])
        return found

    def sample(
        self, requests: Sequence[Request], *, key: int, temperature: float, max_tokens: int
    ) -> list[list[Reply]]:
        """Not what this is for."""
        raise NotImplementedError

    def distributions(self, texts: Sequence[str], options: Sequence[tuple[Option, ...]]) -> list[OptionScores]:
        """Not what this is for."""
        raise NotImplementedError
