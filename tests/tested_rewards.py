"""The rewards that the contract test and the precision test cover: each built-in one, the example plug-in, users' own.

A new reward is one entry of `TESTED`, and one of `MODELS` for each tiny model or server that it needs.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from svdd import rewards
from svdd.rewards import Reward
from tests.test_docs import unpack
from tests.tiny_detectors import save_tiny_owl
from tests.tiny_models import save_tiny_aesthetic_head, save_tiny_clip, save_tiny_open_clip
from tests.tiny_reward_models import (
    brightness,
    chat_server,
    judge,
    marks,
    rubric_server,
    save_alexnet,
    save_tiny_blip,
    save_tiny_dinov2,
    save_tiny_hps_v3,
    save_tiny_image_reward,
    save_tiny_instruct_blip,
    save_tiny_llava,
    save_tiny_qwen,
    save_tiny_resnet,
    save_tiny_vit,
)

__all__ = ["PROMPTS", "TESTED", "Case", "as_pil", "images_of", "pictures", "serving"]

ROOT = Path(__file__).parent.parent
PROMPTS = ["a red apple", "blue car", "panda", "a house, on a hill!"]
Models = Callable[[str], str]  # the folder of a tiny model, or the address of a server, by its name in `MODELS`


def pictures(count: int, height: int = 40, width: int = 40, seed: int = 0) -> Tensor:
    """Returns smooth to noisy images whose pixels are multiples of 1/255."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    smooth = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    noise = torch.rand(count, 3, height, width, generator=generator) - 0.5
    strength = torch.linspace(0, 0.6, count).view(-1, 1, 1, 1)
    return ((smooth + strength * noise).clamp(0, 1) * 255).round() / 255


def words(count: int, height: int = 40, width: int = 40, seed: int = 0) -> Tensor:
    """Returns pictures of words of which ever more letters are those of OPEN, in the middle."""
    made = [Image.new("RGB", (width, height), (250, 250, 240)) for _ in range(count)]
    for k, picture in enumerate(made):
        shown = "OPEN"[: 4 - k % 4].ljust(4, "X")
        place = (width / 2, height / 2)
        ImageDraw.Draw(picture).text(place, shown, fill=(20, 20, 60), font=ImageFont.load_default(14), anchor="mm")
    return torch.stack([torch.from_numpy(np.array(picture)) for picture in made]).permute(0, 3, 1, 2) / 255


def as_pil(images: Tensor) -> list[Image.Image]:
    arrays = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(np.ascontiguousarray(array)) for array in arrays]


def save_reference(folder: Path) -> str:
    as_pil(pictures(1, 48, 64, seed=1))[0].save(folder / "reference.png")
    return str(folder / "reference.png")


# ---- models


def server(answer: Callable[[dict, Any], Any]) -> Callable[[ExitStack, Path], str]:
    return lambda servers, folder: servers.enter_context(chat_server(answer))[0]


def saved(save: Callable[[Path], str]) -> Callable[[ExitStack, Path], str]:
    return lambda servers, folder: save(folder)


MODELS: dict[str, Callable[[ExitStack, Path], str]] = {
    "clip": saved(save_tiny_clip),
    "owl": saved(save_tiny_owl),
    "open_clip": saved(save_tiny_open_clip),
    "head": saved(lambda folder: save_tiny_aesthetic_head(folder, 8)),
    "image_reward": saved(save_tiny_image_reward),
    "vit": saved(save_tiny_vit),
    "resnet": saved(save_tiny_resnet),
    "llava": saved(save_tiny_llava),
    "qwen": saved(save_tiny_qwen),
    "blip": saved(save_tiny_blip),
    "instruct_blip": saved(save_tiny_instruct_blip),
    "hps_v3": saved(save_tiny_hps_v3),
    "dinov2": saved(save_tiny_dinov2),
    "alexnet": saved(save_alexnet),
    "reference": saved(save_reference),
    "endpoint": server(lambda body, handler: judge(body)),
    "rubric": server(rubric_server),
    "marks": server(marks),
    "server": server(brightness),
}


@contextmanager
def serving(new_folder: Callable[[str], Path]) -> Iterator[Models]:
    """Yields a function that returns a model's folder or a server's address, made when it is first asked for."""
    made: dict[str, str] = {}

    def find(name: str) -> str:
        if name not in made:
            made[name] = MODELS[name](servers, new_folder(name))
        return made[name]

    with ExitStack() as servers:
        yield find


# ---- users' own


class Edges(Reward):
    """A user's network, built with the reward, whose `forward` makes tensors of its own."""

    differentiable = True

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3, bias=False).requires_grad_(False).eval()
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            self.layer.weight.copy_(torch.randn(4, 3, 3, 3, generator=generator))
        self.register_buffer("weights", torch.tensor([0.5, -0.25, 1.0, 0.1234567]))

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        grid = torch.linspace(0, 1, images.shape[-1])
        features = self.layer(images * (1 + grid)).square().mean((2, 3))
        return torch.zeros(len(images)) + features @ self.weights + torch.tensor([0.01 * len(p) for p in prompts])


def own(path: str, name: str) -> Any:
    """Returns a class out of a file of users' code."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def redness() -> Reward:
    """Returns the reward that docs/how_to/extending.md defines."""
    with TemporaryDirectory() as folder:
        unpack(ROOT / "docs" / "how_to" / "extending.md", Path(folder))
        return own(f"{folder}/my_rewards.py", "Redness")(weight=2.0)


def mean_red(images: Tensor, prompts: list[str]) -> Tensor:
    return images[:, 0].mean((1, 2))


# ---- the list


@dataclass(frozen=True)
class Case:
    """A reward, and the pictures on which it is tested.

    Args:
        make: Returns the reward, given `models`.
        pictures: Returns pictures as `pictures` does, for rewards that look for something in them.
        prompts: Four prompts.
        ties: Whether several pictures may have the same score, as counts do.
        tolerance: How much a score may depend on the other pictures of a call.
    """

    make: Callable[[Models], Reward]
    pictures: Callable[..., Tensor] = pictures
    prompts: Sequence[str] = tuple(PROMPTS)
    ties: bool = False
    tolerance: float = 1e-6


def images_of(case: Case, count: int, *shape: int) -> tuple[Tensor, list[str]]:
    """Returns pictures of a case and their prompts."""
    return case.pictures(count, *shape), [case.prompts[k % len(case.prompts)] for k in range(count)]


TESTED: dict[str, Case] = {
    "Compressibility": Case(lambda models: rewards.Compressibility()),
    "Incompressibility": Case(lambda models: rewards.Incompressibility()),
    "Colorfulness": Case(lambda models: rewards.Colorfulness()),
    "Sharpness": Case(lambda models: rewards.Sharpness()),
    "Brightness": Case(lambda models: rewards.Brightness()),
    "CLIPScore": Case(lambda models: rewards.CLIPScore(models("clip"))),
    "CLIPScore of open_clip": Case(lambda models: rewards.CLIPScore(architecture=models("open_clip"))),
    "PickScore": Case(lambda models: rewards.PickScore(models("clip"), processor=None)),
    "HPSv2": Case(
        lambda models: rewards.HPSv2(
            models("open_clip").removeprefix("local-dir:") + "/open_clip_pytorch_model.bin", "tiny-open-clip"
        )
    ),
    "Aesthetic": Case(lambda models: rewards.Aesthetic(models("clip"), models("head"))),
    "ImageReward": Case(
        lambda models: rewards.ImageReward(f"{models('image_reward')}/ImageReward.pt", tokenizer=models("image_reward"))
    ),
    "Classifier": Case(lambda models: rewards.Classifier(models("vit"), "Egyptian cat")),
    "Classifier, logit": Case(lambda models: rewards.Classifier(models("resnet"), 4, logit=True)),
    "VLMJudge, LLaVA": Case(lambda models: rewards.VLMJudge(models("llava")), tolerance=1e-5),
    "VLMJudge, Qwen2-VL": Case(lambda models: rewards.VLMJudge(models("qwen"), batch_size=3), tolerance=1e-5),
    "VLMJudge, endpoint": Case(lambda models: rewards.VLMJudge(endpoint=models("endpoint"), model="tiny")),
    "VQAScore, BLIP": Case(lambda models: rewards.VQAScore(models("blip"), answer="no", dtype="float32")),
    "HPSv3": Case(
        lambda models: rewards.HPSv3(
            models("hps_v3") + "/HPSv3.safetensors",
            models("hps_v3") + "/base",
            pixels=64 * 64,
            batch_size=3,
            dtype="float32",
        ),
        tolerance=1e-5,
    ),
    "RubricJudge": Case(
        lambda models: rewards.RubricJudge(endpoint=models("rubric"), model="tiny", rubric="{prompt}?", highest=9)
    ),
    "UnifiedReward": Case(lambda models: rewards.UnifiedReward(endpoint=models("marks"), model="tiny")),
    "ObjectCount": Case(
        lambda models: rewards.ObjectCount(models("owl"), object="panda", count=3, softness=0.2), tolerance=1e-5
    ),
    "HTTPReward": Case(lambda models: rewards.HTTPReward(models("server"), batch_size=3)),
    "TextRendering": Case(
        lambda models: rewards.TextRendering(side=64, without_text=0.0), words, ['a sign "OPEN"', "a “Open” sign"] * 2
    ),
    "TextRendering, soft": Case(lambda models: rewards.TextRendering("open", soft=True, side=64), words),
    "Safety": Case(lambda models: rewards.Safety(), ties=True),
    "FunctionReward": Case(lambda models: rewards.FunctionReward(mean_red, differentiable=True)),
    "FunctionReward, one by one": Case(
        lambda models: rewards.FunctionReward(lambda image, prompt: np.asarray(image).mean(), one_by_one=True)
    ),
    "WeightedSum": Case(
        lambda models: rewards.WeightedSum([rewards.CLIPScore(models("clip")), rewards.Brightness()], [2.0, -0.5])
    ),
    "WeightedSum without gradient": Case(
        lambda models: rewards.WeightedSum([rewards.Compressibility(), rewards.Brightness()])
    ),
    "ZScored": Case(lambda models: rewards.ZScored(rewards.Brightness(), mean=0.4, std=0.1)),
    "Similarity": Case(lambda models: rewards.Similarity("dinov2", models("dinov2"), reference=models("reference"))),
    "Similarity, LPIPS": Case(
        lambda models: rewards.Similarity("lpips", models("alexnet"), reference=models("reference")), tolerance=1e-5
    ),
    "Threshold": Case(lambda models: rewards.Threshold(rewards.Brightness(), at_least=0.7)),
    "WinRate": Case(lambda models: rewards.WinRate(rewards.CLIPScore(models("clip")), temperature=0.5)),
    "a user's network": Case(lambda models: Edges()),
    "the reward of docs/how_to/extending.md": Case(lambda models: redness()),
    "the example plug-in": Case(
        lambda models: own(str(ROOT / "examples/plugin/svdd_warmth/__init__.py"), "Warmth")(strength=2.0)
    ),
}
