"""Yes or no from a vision-language model of transformers."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from svdd import UserError
from svdd.rewards.models.auto_models import read_auto, read_model

__all__ = ["LocalVLM"]


class LocalVLM(nn.Module):
    """Log-odds of yes against no for the token that follows an image and a question.

    Args:
        pretrained: A folder or a hub name.
        dtype: Of the weights.
        options: `revision` and `local_files_only`.

    Raises:
        UserError: If it cannot be loaded, or has no single token for yes and for no.
    """

    def __init__(self, pretrained: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
        super().__init__()
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.model = read_model(AutoModelForImageTextToText, pretrained, dtype, **options)
        if self.model.config.is_encoder_decoder:
            raise UserError(f"pretrained={pretrained!r} has an encoder and a decoder; expected a decoder alone")
        self.processor = read_auto(AutoProcessor, pretrained, **options)
        if not hasattr(self.processor, "tokenizer"):
            raise UserError(f"pretrained={pretrained!r} has no processor of images and text")
        self.answers = [self.tokens_of(word) for word in ("yes", "no")]
        if not all(self.answers):
            raise UserError(f"pretrained={pretrained!r} has no single token for yes, or none for no")
        self.keeps = "logits_to_keep" in inspect.signature(self.model.forward).parameters

    def tokens_of(self, word: str) -> list[int]:
        """Returns the tokens that are this word by themselves, in small or capital letters, after a space or not."""
        tokenizer = self.processor.tokenizer
        variants = {start + form for start in ("", " ") for form in (word, word.capitalize(), word.upper())}
        coded = [tokenizer.encode(variant, add_special_tokens=False) for variant in variants]
        return sorted({ids[0] for ids in coded if len(ids) == 1 and ids[0] != tokenizer.unk_token_id})

    def inputs(self, pictures: Sequence[Image.Image], questions: Sequence[str]) -> Any:
        """Returns what the model reads: one turn of a chat where the model has a template, else image and question."""
        own = hasattr(self.processor, "num_query_tokens")  # BLIP-2 puts the image before the text by itself
        place = "" if own else f"{getattr(self.processor, 'image_token', '')}\n"
        texts = [place + question for question in questions]
        options: dict[str, Any] = {}
        if getattr(self.processor, "chat_template", None) is not None:
            contents = [[{"type": "image"}, {"type": "text", "text": question}] for question in questions]
            turns = [[{"role": "user", "content": content}] for content in contents]
            texts = self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            start = self.processor.tokenizer.bos_token
            options = {"add_special_tokens": False} if start and texts[0].startswith(start) else {}
        self.processor.tokenizer.padding_side = "right"  # then every position is that of a text alone
        images = [[picture] for picture in pictures]
        return self.processor(text=texts, images=images, padding=True, return_tensors="pt", **options)

    def forward(self, pictures: Sequence[Image.Image], questions: Sequence[str]) -> Tensor:
        """Returns log p(yes) - log p(no) for each picture and question, float32 [n]."""
        inputs = self.inputs(pictures, questions).to(self.model.device, self.model.dtype)
        mask = inputs["attention_mask"]
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)  # [n]
        if self.keeps:  # a row of logits is as long as the vocabulary
            kept, place = last.unique(return_inverse=True)
            logits = self.model(**inputs, logits_to_keep=kept).logits
        else:
            logits, place = self.model(**inputs).logits, last
        logits = logits[torch.arange(len(place), device=place.device), place].float()
        yes, no = (logits[:, tokens].logsumexp(1) for tokens in self.answers)
        return yes - no
