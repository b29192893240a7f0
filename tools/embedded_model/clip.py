"""Trains two CLIPs: one conditions the diffusion model through its text tower, the other is an independent judge."""

import argparse
import json
from pathlib import Path

import lightning as L
import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from tools.embedded_model.scenes import Scenes
from tools.embedded_model.training import SceneBatches, fit, hold_then_cosine, to_unit

__all__ = ["ARCHITECTURES", "MEAN", "STD", "CLIPTraining", "build_tokenizer", "preprocess"]

TOKENS = 16
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
ARCHITECTURES = {
    "clip": {
        "text": {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 3, "num_attention_heads": 4},
        "vision": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
        | {"patch_size": 8},
        "steps": 1500,
        "seed": 0,
    },
    "judge": {
        "text": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2},
        "vision": {"hidden_size": 192, "intermediate_size": 576, "num_hidden_layers": 3, "num_attention_heads": 6}
        | {"patch_size": 16},
        "steps": 2000,
        "seed": 1,
    },
}


def build_tokenizer(work: Path) -> CLIPTokenizer:
    """Returns CLIP's byte-level BPE, trained on 20,000 captions; 16 tokens at most, any UTF-8 text encodes."""
    folder = work / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        rng = np.random.default_rng(0)
        _, captions = Scenes(work).batch(20000, rng)
        trainer = trainers.BpeTrainer(
            vocab_size=1575,
            min_frequency=1,
            end_of_word_suffix="</w>",
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        tokenizer.train_from_iterator(captions, trainer)
        trained = json.loads(tokenizer.to_str())["model"]
        merges = [tuple(pair) for pair in trained["merges"]]
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        words = letters + [letter + "</w>" for letter in letters]
        words += [word for word in dict.fromkeys(a + b for a, b in merges) if word not in words]
        words += ["<|startoftext|>", "<|endoftext|>"]
        vocab = {word: index for index, word in enumerate(words)}
        CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def preprocess(images: Tensor) -> Tensor:
    """Normalises float [n, 3, 64, 64] in [0, 1] as the CLIP image processor does."""
    mean, std = (images.new_tensor(values)[:, None, None] for values in (MEAN, STD))
    return (images - mean) / std


class CLIPTraining(L.LightningModule):
    """Symmetric contrastive loss; scenes of a batch with the same caption are positives of each other.

    Args:
        name: A key of `ARCHITECTURES`.
        tokenizer: Tokenizer of the captions.
    """

    def __init__(self, name: str, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        parts = ARCHITECTURES[name]
        torch.manual_seed(parts["seed"])
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        text = parts["text"] | ids | {"max_position_embeddings": TOKENS, "vocab_size": len(tokenizer)}
        text |= {"pad_token_id": tokenizer.pad_token_id, "projection_dim": 128}
        vision = parts["vision"] | {"image_size": 64, "projection_dim": 128}
        self.clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))
        self.tokenizer, self.steps = tokenizer, parts["steps"]

    def training_step(self, batch: tuple[Tensor, list[str]], batch_idx: int) -> Tensor:
        """Returns the contrastive loss of one batch of scenes."""
        images, captions = batch
        tokens = self.tokenizer(captions, padding=True, return_tensors="pt", truncation=True)
        logits = self.clip(pixel_values=preprocess(to_unit(images)), **tokens).logits_per_text
        index = {caption: k for k, caption in enumerate(dict.fromkeys(captions))}
        label = torch.tensor([index[caption] for caption in captions])
        same = (label[:, None] == label[None, :]).float()
        target = same / same.sum(-1, keepdim=True)
        loss = -0.5 * ((target * logits.log_softmax(1)).sum(1) + (target * logits.T.log_softmax(1)).sum(1)).mean()
        self.log_dict({"loss": loss, "top1": same.gather(1, logits.T.argmax(1)[:, None]).mean()})
        return loss

    def configure_optimizers(self) -> dict:
        """AdamW with a cosine schedule."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=1.5e-3, weight_decay=0.05, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: hold_then_cosine(s, self.steps, 0.0))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--name", choices=tuple(ARCHITECTURES), required=True)
    arguments = parser.parse_args()
    training = CLIPTraining(arguments.name, build_tokenizer(arguments.work))
    batches = SceneBatches(arguments.work, 80, seed=10 + ARCHITECTURES[arguments.name]["seed"])
    fit(training, batches.loader(), arguments.work / arguments.name, training.steps)
