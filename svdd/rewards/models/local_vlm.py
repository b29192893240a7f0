"""Answers to yes/no questions about images by a vision-language model of transformers.

Sources: Lin et al., Evaluating Text-to-Visual Generation with Image-to-Text Generation, 2024, arXiv 2404.01291; Huang
et al., T2I-CompBench, 2023, arXiv 2307.06350 (BLIP).
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from svdd import UserError
from svdd.assets.hub import check_tokenizer, read_auto, read_model

__all__ = ["Answers", "LocalVLM", "read_vlm"]


class Answers(NamedTuple):
    """Logarithms of the probabilities of answers, under the softmax over the whole vocabulary, float32 [n].

    Attributes:
        yes: Of all tokens that spell yes, in upper or lower case, with or without a leading space.
        no: Of all tokens that spell no.
        exact: Of one answer in one spelling; of several tokens, the mean of their log-probabilities.
        other: Of all that is not this answer, log(1 - p), without loss of digits where p is almost 1.
    """

    yes: Tensor
    no: Tensor
    exact: Tensor
    other: Tensor


def read_vlm(pretrained: str, dtype: torch.dtype, options: dict[str, Any]) -> "LocalVLM":
    """Returns the model of a folder or of a hub name; raises UserError if it cannot answer yes or no."""
    from transformers import AutoConfig, AutoModelForImageTextToText, BlipForQuestionAnswering

    blip = read_auto(AutoConfig, pretrained, **options).model_type == "blip"
    model = read_model(BlipForQuestionAnswering if blip else AutoModelForImageTextToText, pretrained, dtype, **options)
    whole, text = model.config, model.config.get_text_config()
    writes = any(getattr(config, "is_encoder_decoder", False) for config in (whole, text))
    return (_Blip if blip else _EncoderDecoder if writes else _Decoder)(model, pretrained, options)


class LocalVLM(nn.Module, ABC):
    """A vision-language model of transformers with its processor."""

    limits: Mapping[str, Any] = {}  # of the lengths of texts

    def __init__(self, model: Any, pretrained: str, options: dict[str, Any]) -> None:
        super().__init__()
        from transformers import AutoProcessor

        self.model, self.pretrained = model, pretrained
        self.processor = read_auto(AutoProcessor, pretrained, **options)
        if not hasattr(self.processor, "tokenizer"):
            raise UserError(f"pretrained={pretrained!r} has no processor for images and text")
        self.processor.tokenizer.padding_side = "right"  # positions are those of unpadded texts
        words = self.model.get_input_embeddings().num_embeddings
        check_tokenizer(self.processor.tokenizer, f"the tokenizer of {pretrained!r}", words)
        self.yes, self.no = (self.tokens_of(word) for word in ("yes", "no"))
        if not (self.yes and self.no):
            raise UserError(f"pretrained={pretrained!r} has no single token for yes, or none for no")

    def tokens_of(self, word: str) -> list[int]:
        """Returns the tokens that are exactly this word, in lower or upper case, with or without a leading space."""
        tokenizer = self.processor.tokenizer
        variants = {start + form for start in ("", " ") for form in (word, word.capitalize(), word.upper())}
        coded = [tokenizer.encode(variant, add_special_tokens=False) for variant in variants]
        return sorted({ids[0] for ids in coded if len(ids) == 1 and ids[0] != tokenizer.unk_token_id})

    def spell(self, answer: str) -> list[int]:
        """Returns the tokens of an answer whose probability the model can give; raises UserError for another."""
        tokens = self.processor.tokenizer.encode(answer, add_special_tokens=False)
        if len(tokens) == 1 and tokens[0] != self.processor.tokenizer.unk_token_id:
            return tokens
        problem = f"answer={answer!r} is {len(tokens)} tokens of {self.pretrained!r}" if tokens else "answer is empty"
        raise UserError(f"{problem}; expected a single token, such as Yes")

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
            texts = [self.place() + question for question in questions]
        images = [[picture] for picture in pictures]
        inputs = processor(text=texts, images=images, padding=True, return_tensors="pt", **self.limits, **options)
        return inputs.to(self.model.device, self.model.dtype)

    def place(self) -> str:
        """Returns what stands for the image in a text without a chat template."""
        inserts_image = hasattr(self.processor, "num_query_tokens")  # as BLIP-2's processor does
        return "" if inserts_image else f"{getattr(self.processor, 'image_token', '')}\n"

    @abstractmethod
    def logits(self, inputs: Any, answer: list[int]) -> Tensor:
        """Returns the logits of each token of the answer, given those before it, [n, length, vocabulary]."""

    def forward(self, pictures: Sequence[Image.Image], questions: list[str], answer: str = "Yes") -> Answers:
        """Returns the probabilities of yes, of no and of the exact answer to each question about its picture."""
        tokens = self.spell(answer)
        logits = self.logits(self.inputs(pictures, questions), tokens).float()
        total = logits.logsumexp(-1)  # [n, length]
        yes, no = (logits[:, 0, words].logsumexp(1) - total[:, 0] for words in (self.yes, self.no))
        index = torch.tensor(tokens, device=logits.device)[None, :, None].expand(len(logits), -1, -1)
        exact = logits.gather(2, index)[..., 0] - total
        other = logits.scatter(2, index, -torch.inf).logsumexp(-1) - total  # of each token
        missed = (1 - exact.mean(1).exp()).clamp(min=1e-7).log() if len(tokens) > 1 else other[:, 0]
        return Answers(yes, no, exact.mean(1), missed)


class _Decoder(LocalVLM):
    """A model that continues the question, such as LLaVA and Qwen-VL."""

    def __init__(self, model: Any, pretrained: str, options: dict[str, Any]) -> None:
        super().__init__(model, pretrained, options)
        self.keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def logits(self, inputs: Any, answer: list[int]) -> Tensor:
        mask = inputs["attention_mask"]
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)  # [n]
        if self.keeps:  # saves memory: a row of logits is as long as the vocabulary
            kept, place = last.unique(return_inverse=True)
            logits = self.model(**inputs, logits_to_keep=kept).logits
        else:
            logits, place = self.model(**inputs).logits, last
        return logits[torch.arange(len(place), device=place.device), place][:, None]


class _EncoderDecoder(LocalVLM):
    """A model whose decoder writes the answer, such as BLIP-2 and InstructBLIP with FLAN-T5.

    As in the code of VQAScore's authors, the exact answer includes the end of the text.
    """

    def spell(self, answer: str) -> list[int]:
        if tokens := self.processor.tokenizer.encode(answer, add_special_tokens=False):
            return [*tokens, self.processor.tokenizer.eos_token_id]
        raise UserError("answer is empty; expected a word such as Yes")

    def logits(self, inputs: Any, answer: list[int]) -> Tensor:
        sources = (self.model.generation_config, self.model.config.get_text_config())
        starts = [getattr(source, "decoder_start_token_id", None) for source in sources]
        starts += [self.processor.tokenizer.pad_token_id]  # of T5
        start = next(token for token in starts if token is not None)
        row = torch.tensor([start, *answer[:-1]], device=self.model.device)
        return self.model(**inputs, decoder_input_ids=row.expand(len(inputs["input_ids"]), -1)).logits


class _Blip(LocalVLM):
    """BLIP for visual question answering: a decoder reads what an encoder of the question has seen in the image."""

    def __init__(self, model: Any, pretrained: str, options: dict[str, Any]) -> None:
        super().__init__(model, pretrained, options)
        self.limits = {"truncation": True, "max_length": model.config.text_config.max_position_embeddings}

    def place(self) -> str:
        return ""

    def logits(self, inputs: Any, answer: list[int]) -> Tensor:
        model, ids, mask = self.model, inputs["input_ids"], inputs["attention_mask"]
        first = model.decoder_start_token_id
        if first + 1 < model.config.text_config.vocab_size:
            ids[:, 0] = first + 1  # [ENC], as in training
        seen = model.vision_model(pixel_values=inputs["pixel_values"]).last_hidden_state
        read = model.text_encoder(ids, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
        start, lengths = torch.full_like(ids[:, :1], first), mask.sum(1)
        logits = [
            model.text_decoder(start[row : row + 1], encoder_hidden_states=read[row : row + 1, :length]).logits
            for row, length in enumerate(lengths.tolist())  # transformers ignores a mask here
        ]
        return torch.cat(logits)
