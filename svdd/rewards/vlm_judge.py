"""A vision-language model's log-odds of yes against no when asked whether the image shows the prompt.

Sources: Lin et al., Evaluating Text-to-Visual Generation with Image-to-Text Generation, 2024, arXiv 2404.01291;
Black et al., Training Diffusion Models with Reinforcement Learning, 2023, arXiv 2305.13301.
"""

import inspect
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from svdd import UserError
from svdd.assets.hub import check_tokenizer, read_auto, read_model
from svdd.rewards.models.http_client import from_environment
from svdd.rewards.models.pixels import to_pil
from svdd.rewards.models.vlm_endpoint import Endpoint
from svdd.rewards.pretrained import Precision, PretrainedReward

__all__ = ["VLMJudge"]


class VLMJudge(PretrainedReward):
    """Log-odds of "yes" against "no" when a vision-language model is asked about the image.

    Args:
        pretrained: A local image-text-to-text model: a folder or a hub name. Default: `Qwen/Qwen2-VL-2B-Instruct`.
        question: The question; `{prompt}` stands for the prompt.
        batch_size: Images per batch of a local model.
        endpoint: Address of a server with OpenAI's chat API, `http://localhost:8000/v1`, instead of `pretrained`.
        model: The endpoint's name for the model.
        api_key_env: Name of the environment variable that holds the endpoint's key. The key is never stored or shown.
        timeout: Seconds to wait for the endpoint's answer.
        retries: How often a request is repeated after a time-out, too many requests, or a server error.
        backoff: Seconds before the first repetition; doubled each time.
        concurrency: Number of simultaneous requests.
        revision: Branch, tag or commit of a hub model.
        local_files_only: Use local files and the hub's cache only.
        dtype: Precision of a local model, whatever that of the Trainer: half precision saves memory, and time on a GPU.

    Raises:
        UserError: If an argument is out of range, or the arguments contradict each other.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        question: str = 'Does this image show: "{prompt}"? Answer yes or no.',
        batch_size: int = 8,
        endpoint: str | None = None,
        model: str | None = None,
        api_key_env: str | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        backoff: float = 0.5,
        concurrency: int = 8,
        revision: str | None = None,
        local_files_only: bool = False,
        dtype: Precision = "float32",
    ) -> None:
        super().__init__(revision=revision, local_files_only=local_files_only, dtype=dtype)
        if batch_size < 1:
            raise UserError(f"batch_size must be >= 1, got {batch_size}")
        self.question, self.batch_size, self.api_key_env = question, batch_size, api_key_env
        self.pretrained = pretrained or "Qwen/Qwen2-VL-2B-Instruct"
        self.endpoint: Endpoint | None = None
        if endpoint is None:
            if model is not None or api_key_env is not None:
                raise UserError("model and api_key_env belong to an endpoint; give endpoint, or pretrained alone")
        elif pretrained is not None or not model:
            raise UserError("an endpoint needs model, its name for the model, and takes no pretrained")
        else:
            self.endpoint = Endpoint(endpoint, model, timeout, retries, backoff, concurrency)

    @property
    def one_call(self) -> bool:  # type: ignore[override]
        """Whether an endpoint answers, to which each image is a request of its own."""
        return self.endpoint is not None

    def loading_key(self) -> Hashable:
        """Returns what determines the local model."""
        return (type(self), self.pretrained, self.dtype, *self.options.values()) if self.endpoint is None else None

    def read(self) -> nn.Module:
        """Returns the local model, or an empty module for an endpoint."""
        if self.endpoint is None:
            return LocalVLM(self.pretrained, self.anchor.dtype, self.options)
        self.key()
        return nn.Module()

    @torch.no_grad()
    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns the log-odds for each image and its own prompt, float32 [n]."""
        pictures = to_pil(images)
        questions = [self.question.replace("{prompt}", prompt) for prompt in prompts]
        if self.endpoint is not None:
            return images.new_tensor(self.endpoint.log_odds(pictures, questions, self.key()), dtype=torch.float32)
        chunks = (slice(k, k + self.batch_size) for k in range(0, len(images), self.batch_size))
        return torch.cat([self.network(pictures[chunk], questions[chunk]) for chunk in chunks])

    def key(self) -> str | None:
        """Returns the endpoint's key from the environment; raises UserError if it is not set or unprintable."""
        return None if self.api_key_env is None else from_environment(self.api_key_env)


class LocalVLM(nn.Module):
    """Log-odds of yes against no for the first token of the answer to a question about an image."""

    def __init__(self, pretrained: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
        super().__init__()
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.model = read_model(AutoModelForImageTextToText, pretrained, dtype, **options)
        if self.model.config.is_encoder_decoder:
            raise UserError(f"pretrained={pretrained!r} is an encoder-decoder model; expected a decoder only")
        self.processor = read_auto(AutoProcessor, pretrained, **options)
        if not hasattr(self.processor, "tokenizer"):
            raise UserError(f"pretrained={pretrained!r} has no processor for images and text")
        words = self.model.get_input_embeddings().num_embeddings
        check_tokenizer(self.processor.tokenizer, f"the tokenizer of {pretrained!r}", words)
        self.answers = [self.tokens_of(word) for word in ("yes", "no")]
        if not all(self.answers):
            raise UserError(f"pretrained={pretrained!r} has no single token for yes, or none for no")
        self.keeps = "logits_to_keep" in inspect.signature(self.model.forward).parameters

    def tokens_of(self, word: str) -> list[int]:
        """Returns the tokens that are exactly this word, in lower or upper case, with or without a leading space."""
        tokenizer = self.processor.tokenizer
        variants = {start + form for start in ("", " ") for form in (word, word.capitalize(), word.upper())}
        coded = [tokenizer.encode(variant, add_special_tokens=False) for variant in variants]
        return sorted({ids[0] for ids in coded if len(ids) == 1 and ids[0] != tokenizer.unk_token_id})

    def inputs(self, pictures: Sequence[Image.Image], questions: list[str]) -> Any:
        """Returns the model's inputs: one chat turn if the model has a template, else image and question."""
        processor, options = self.processor, {}
        if getattr(processor, "chat_template", None) is not None:
            contents = [[{"type": "image"}, {"type": "text", "text": question}] for question in questions]
            turns = [[{"role": "user", "content": content}] for content in contents]
            texts = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            start = processor.tokenizer.bos_token
            options = {"add_special_tokens": False} if start and texts[0].startswith(start) else {}
        else:
            inserts_image = hasattr(processor, "num_query_tokens")  # as BLIP-2's processor does
            place = "" if inserts_image else f"{getattr(processor, 'image_token', '')}\n"
            texts = [place + question for question in questions]
        processor.tokenizer.padding_side = "right"  # positions are those of unpadded texts
        images = [[picture] for picture in pictures]
        return processor(text=texts, images=images, padding=True, return_tensors="pt", **options)

    def forward(self, pictures: Sequence[Image.Image], questions: list[str]) -> Tensor:
        """Returns log p(yes) - log p(no) for each image and question, float32 [n]."""
        inputs = self.inputs(pictures, questions).to(self.model.device, self.model.dtype)
        mask = inputs["attention_mask"]
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)  # [n]
        if self.keeps:  # saves memory: a row of logits is as long as the vocabulary
            kept, place = last.unique(return_inverse=True)
            logits = self.model(**inputs, logits_to_keep=kept).logits
        else:
            logits, place = self.model(**inputs).logits, last
        logits = logits[torch.arange(len(place), device=place.device), place].float()
        yes, no = (logits[:, tokens].logsumexp(1) for tokens in self.answers)
        return yes - no
