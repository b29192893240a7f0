"""Yes or no from a vision-language model of transformers."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from svdd import UserError
from svdd.rewards.models.networks import read_auto, read_model

__all__ = ["LocalVLM"]


class LocalVLM(nn.Module):
    """Log-odds of yes against no for the first token of the answer to a question about an image.

    Raises:
        UserError: If it cannot be loaded, or has no single token for yes or for no.
    """

    def __init__(self, pretrained: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
        super().__init__()
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.model = read_model(AutoModelForImageTextToText, pretrained, dtype, **options)
        if self.model.config.is_encoder_decoder:
            raise UserError(f"pretrained={pretrained!r} is an encoder-decoder model; expected a decoder only")
        self.processor = read_auto(AutoProcessor, pretrained, **options)
        if not hasattr(self.processor, "tokenizer"):
            raise UserError(f"pretrained={pretrained!r} has no processor for images and text")
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

    def inputs(self, pictures: Sequence[Image.Image], questions: Sequence[str]) -> Any:
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

    def forward(self, pictures: Sequence[Image.Image], questions: Sequence[str]) -> Tensor:
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
