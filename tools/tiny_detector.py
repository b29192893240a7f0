"""Trains a small OWLv2 on drawn discs and squares: a detector that works where no hub can be reached.

    python -m tools.tiny_detector FOLDER --steps 1400

It is the published architecture with fewer layers, saved as transformers saves it. A patch whose centre lies in the
middle of a shape is trained to name it and to give its box; all other patches, to find nothing.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss
from transformers import CLIPTokenizer, Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessor, Owlv2Processor

from svdd.assets.hub import ASSETS
from svdd.rewards.models.detectors import Owl

__all__ = ["SHAPES", "SIDE", "draw", "random_scene", "train"]

SIDE, PATCH = 64, 8  # pixels
SHAPES = ("disc", "square")


def draw(
    canvas: Tensor, shape: str, centre: tuple[float, float], radius: float, colour: Tensor, opacity: float
) -> None:
    """Draws a shape with soft edges on float [3, h, w] in place; `centre` is x and y in pixels."""
    rows, columns = torch.meshgrid(*(torch.arange(side) + 0.5 for side in canvas.shape[1:]), indexing="ij")
    x, y = columns - centre[0], rows - centre[1]
    reach = (x**2 + y**2).sqrt() if shape == "disc" else torch.maximum(x.abs(), y.abs())
    inside = opacity * (radius + 0.5 - reach).clamp(0, 1)
    canvas.mul_(1 - inside).add_(colour[:, None, None] * inside)


def random_scene(generator: torch.Generator) -> tuple[Tensor, list[tuple[int, float, float, float]]]:
    """Returns an image, float [3, 64, 64], and its shapes: index in SHAPES, x, y and radius in pixels."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    background = 0.75 + 0.25 * torch.rand(3, generator=generator)
    image = background[:, None, None].repeat(1, SIDE, SIDE)
    shapes: list[tuple[int, float, float, float]] = []
    for _ in range(int(uniform(0, 9))):
        radius = uniform(4.5, 8)
        x, y = uniform(radius, SIDE - radius), uniform(radius, SIDE - radius)
        if any(math.hypot(x - a, y - b) < 1.2 * (radius + r) for _, a, b, r in shapes):
            continue
        colour = 0.6 * torch.rand(3, generator=generator)
        kind = int(uniform(0, len(SHAPES)))
        draw(image, SHAPES[kind], (x, y), radius, colour, 1.0)
        shapes.append((kind, x, y, radius))
    image += 0.03 * uniform(0, 1) * torch.randn(image.shape, generator=generator)
    return image.clamp(0, 1), shapes


def targets(shapes: list[tuple[int, float, float, float]]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns for each patch its class (-1: none; -2: not trained), its box and whether the box is trained."""
    grid = SIDE // PATCH
    rows, columns = torch.meshgrid(*[(torch.arange(grid) + 0.5) * PATCH] * 2, indexing="ij")
    kinds, boxes = torch.full((grid * grid,), -1), torch.zeros(grid * grid, 4)
    for kind, x, y, radius in shapes:
        away = ((columns - x) ** 2 + (rows - y) ** 2).sqrt().flatten()
        kinds[away < radius] = torch.where(kinds[away < radius] >= 0, kinds[away < radius], -2)
        best = int(away.argmin())
        kinds[best] = kind
        boxes[best] = torch.tensor([x, y, 2 * radius, 2 * radius]) / SIDE
    return kinds, boxes, kinds >= 0


def new_model() -> tuple[Owlv2ForObjectDetection, Owlv2Processor]:
    """Returns the model, 0.6 million parameters, and its processor, with the tokenizer of the embedded CLIP."""
    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "emoji-clip")
    words = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")} | {
        "vocab_size": len(tokenizer)
    }
    config = Owlv2Config(
        text_config={
            **words,
            "hidden_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 128,
            "max_position_embeddings": 16,
        },
        vision_config={
            "hidden_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "image_size": SIDE,
            "patch_size": PATCH,
        },
        projection_dim=64,
    )
    model = Owlv2ForObjectDetection(config)
    head = model.class_head
    boxes = model.box_head.dense2
    with torch.no_grad():  # at first logits are 10 (cosine - 0.5), so that nothing is found, and boxes are the patches
        for layer, bias in ((head.logit_scale, 9.0), (head.logit_shift, -0.5), (boxes, 0.0)):
            layer.weight.zero_()
            layer.bias.fill_(bias)
    pixels = Owlv2ImageProcessor(size={"height": SIDE, "width": SIDE})
    return model, Owlv2Processor(pixels, tokenizer)


def train(folder: Path, steps: int = 1400, batch: int = 24, seed: int = 0) -> None:
    """Trains the detector with AdamW and saves it with its processor."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model, processor = new_model()
    detector = Owl(model, processor)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=steps, pct_start=0.1)
    words = detector.inputs(SHAPES)
    for step in range(steps):
        scenes = [random_scene(generator) for _ in range(batch)]
        kinds, boxes, boxed = (torch.stack(part) for part in zip(*(targets(s) for _, s in scenes), strict=True))
        pixels = processor.image_processor(images=[i for i, _ in scenes], do_rescale=False, return_tensors="pt")
        out = model(**pixels, **{name: tensor.repeat(batch, 1) for name, tensor in words.items()})
        wanted = F.one_hot(kinds.clamp(min=0), len(SHAPES)).float() * boxed[..., None]
        logits = out.logits[kinds > -2]
        named = F.binary_cross_entropy_with_logits(logits, wanted[kinds > -2], reduction="none")
        loss = named.sum() / boxed.sum().clamp(min=1)
        if boxed.any():
            found, true = out.pred_boxes[boxed], boxes[boxed]
            corners = (
                torch.cat([box[:, :2] - box[:, 2:] / 2, box[:, :2] + box[:, 2:] / 2], 1) for box in (found, true)
            )
            loss = loss + 5 * F.l1_loss(found, true) + generalized_box_iou_loss(*corners, reduction="mean")
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}, of names {named.sum() / boxed.sum():.3f}", flush=True)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1400)
    options = parser.parse_args()
    train(options.folder, options.steps)
