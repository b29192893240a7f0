"""Rewards that ask a vision-language model behind an endpoint for a number."""

import math
from abc import abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from svdd import UserError, require_at_least
from svdd.rewards.base import Reward
from svdd.rewards.models.http_client import from_environment
from svdd.rewards.models.pixels import to_pil
from svdd.rewards.models.vlm_endpoint import Answer, Endpoint

__all__ = ["EndpointReward", "is_weighting"]


@dataclass(eq=False, repr=False, kw_only=True)
class EndpointReward(Reward):
    """A reward that asks a model behind an endpoint; a subclass, a dataclass, implements `questions` and `read`.

    Args:
        endpoint: Address of a server with OpenAI's chat API, `http://localhost:8000/v1`. It may change when a run
            continues.
        model: The endpoint's name for the model.
        label: Ends the reward's name, as several in one run need.
        max_tokens: The largest number of tokens of an answer.
        on_unreadable: What an answer without a usable number is: `raise` an error, or the `lowest` score.
        api_key_env: Name of the environment variable that holds the endpoint's key. The key is never stored or shown.
        timeout: Seconds to wait for an answer.
        retries: How often a request is repeated after a failed connection, a time-out, or the status 408, 425, 429 or
            5xx. The default bridges an outage of two minutes.
        backoff: Seconds before the first repetition; doubled each time, up to 30.
        concurrency: Number of simultaneous requests.
    """

    endpoint: str
    model: str
    label: str = ""
    max_tokens: int = 16
    on_unreadable: Literal["raise", "lowest"] = "raise"
    api_key_env: str | None = None
    timeout: float = 120.0
    retries: int = 8
    backoff: float = 1.0
    concurrency: int = 16
    logprobs = False  # whether `read` uses the probabilities of the first token
    one_call, takes_bytes = True, True
    threads = 1  # the client sends requests concurrently itself

    def __post_init__(self) -> None:
        super().__init__()
        rules = (self.timeout, self.retries, self.backoff, self.concurrency)
        self.server = Endpoint(self.endpoint, self.model, *rules)
        require_at_least(1, max_tokens=self.max_tokens)
        if self.on_unreadable not in ("raise", "lowest"):
            raise UserError(f"on_unreadable must be raise or lowest, got {self.on_unreadable!r}")
        self.variant = self.label

    @abstractmethod
    def questions(self, prompt: str) -> Sequence[str]:
        """Returns the questions about an image of a prompt, as many for each prompt."""

    @abstractmethod
    def read(self, answer: Answer) -> float:
        """Returns the number in an answer; raises ValueError if it holds none."""

    def combine(self, scores: Tensor) -> Tensor:
        """Returns one score per image, float32 [n], from those of its questions, float32 [n, questions]."""
        return scores.mean(1)

    def key(self) -> str | None:
        """Returns the endpoint's key; raises UserError if its variable is not set."""
        return None if self.api_key_env is None else from_environment(self.api_key_env)

    def load(self) -> None:
        """Checks that the key is there."""
        self.key()

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns the score of each image, float32 [n]."""
        asked = [self.questions(prompt) for prompt in prompts]
        pairs = [(image, question) for image, own in zip(to_pil(images), asked, strict=True) for question in own]
        pictures, questions = zip(*pairs, strict=True)
        scores = self.server.ask(pictures, questions, self.key(), self._read, self.max_tokens, self.logprobs)
        return self.combine(torch.tensor(scores, dtype=torch.float32).view(len(images), -1)).to(images.device)

    def _read(self, answer: Answer) -> float:
        try:
            return self.read(answer)
        except ValueError:
            if self.on_unreadable == "raise":
                raise
            return self.range[0]


def is_weighting(weights: Collection[float]) -> bool:
    """Whether weights are finite and at least 0, and one of them is above 0."""
    return all(0 <= weight < math.inf for weight in weights) and any(weight > 0 for weight in weights)
