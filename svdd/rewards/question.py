"""Rewards that ask a vision-language model a yes/no question about each image."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from svdd import UserError
from svdd.rewards.models.http_client import from_environment
from svdd.rewards.models.local_vlm import Answers, read_vlm
from svdd.rewards.models.pixels import to_pil
from svdd.rewards.models.vlm_endpoint import Endpoint
from svdd.rewards.pretrained import PretrainedReward

__all__ = ["QuestionReward"]


@dataclass(eq=False, repr=False)
class QuestionReward(PretrainedReward):
    """A reward from the answers of a vision-language model: a local one, or one behind an endpoint.

    `ask` answers any questions, one about each image.

    Args:
        pretrained: A local model: a folder or a hub name of an image-text-to-text model of transformers, or of BLIP for
            visual question answering.
        question: The question; `{prompt}` stands for the prompt.
        batch_size: Images per batch of a local model.
        endpoint: Address of a server with OpenAI's chat API, `http://localhost:8000/v1`, instead of `pretrained`.
        model: The endpoint's name for the model.
        api_key_env: Name of the environment variable that holds the endpoint's key. The key is never stored or shown.
        timeout: Seconds to wait for the endpoint's answer.
        retries: How often a request is repeated after a failed connection, a time-out, or the status 408, 425, 429 or
            5xx. The default bridges an outage of two minutes.
        backoff: Seconds before the first repetition; doubled each time, up to 30.
        concurrency: Number of simultaneous requests.
        label: Ends the reward's name, as several in one run need.

    Raises:
        UserError: If an argument is out of range, or the arguments contradict each other.
    """

    pretrained: str | None = None
    question: str = 'Does this image show: "{prompt}"? Answer yes or no.'
    batch_size: int = 8
    endpoint: str | None = None
    model: str | None = None
    api_key_env: str | None = None
    timeout: float = 60.0
    retries: int = 8
    backoff: float = 1.0
    concurrency: int = 8
    label: str = field(default="", kw_only=True)
    default: ClassVar[str]  # the local model
    takes_bytes = True

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size must be >= 1, got {self.batch_size}")
        self.service: Endpoint | None = None
        if self.endpoint is None:
            if self.model is not None or self.api_key_env is not None:
                raise UserError("model and api_key_env belong to an endpoint; give endpoint, or pretrained alone")
        elif self.pretrained is not None or not self.model:
            raise UserError("an endpoint needs model, its name for the model, and takes no pretrained")
        self.pretrained = self.pretrained or self.default
        super().__post_init__()
        self.variant = self.label
        if self.endpoint is not None:
            self.service = Endpoint(
                self.endpoint, str(self.model), self.timeout, self.retries, self.backoff, self.concurrency
            )

    @property
    def one_call(self) -> bool:  # type: ignore[override]
        """Whether an endpoint answers, to which each image is a request of its own."""
        return self.service is not None

    @property
    def threads(self) -> int:  # type: ignore[override]
        """One thread beside the device for an endpoint, whose client sends requests concurrently itself."""
        return 0 if self.service is None else 1

    def loading_key(self) -> Hashable:
        """Returns what determines the local model."""
        return ("vlm", self.pretrained, self.dtype, *self.options.values()) if self.service is None else None

    def read(self) -> nn.Module:
        """Returns the local model, or an empty module for an endpoint."""
        if self.service is None:
            return read_vlm(str(self.pretrained), self.anchor.dtype, self.options)
        self.key()
        return nn.Module()

    def questions(self, prompts: Sequence[str]) -> list[str]:
        """Returns the question about each prompt."""
        return [self.question.replace("{prompt}", prompt) for prompt in prompts]

    @torch.no_grad()
    def ask(self, images: Tensor, questions: Sequence[str], answer: str = "Yes") -> Answers:
        """Returns the log-probabilities of the answers to one question about each image, float32 [n].

        Args:
            images: Float [n, 3, h, w] in [0, 1].
            questions: n questions.
            answer: The answer for `Answers.exact`.
        """
        pictures, texts = to_pil(images), list(questions)
        if self.service is not None:
            found = self.service.log_probabilities(pictures, texts, self.key(), answer)
            return Answers(*(images.new_tensor(column, dtype=torch.float32) for column in zip(*found, strict=True)))
        chunks = (slice(k, k + self.batch_size) for k in range(0, len(images), self.batch_size))
        parts = [self.network(pictures[chunk], texts[chunk], answer) for chunk in chunks]
        return Answers(*map(torch.cat, zip(*parts, strict=True)))

    def log_odds(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        """Returns log p(yes) - log p(no) for one question about each image, float32 [n]."""
        answers = self.ask(images, questions)
        return answers.yes - answers.no

    def key(self) -> str | None:
        """Returns the endpoint's key from the environment; raises UserError if it is not set or unprintable."""
        return None if self.api_key_env is None else from_environment(self.api_key_env)
