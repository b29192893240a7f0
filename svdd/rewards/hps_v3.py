"""Human preference, learned from rankings of pictures by people and by generation of models, on Qwen2-VL.

Source: Ma et al., HPSv3: Towards Wide-Spectrum Human Preference Score, 2025, arXiv 2508.03789; the instruction, the
network and its inputs are those of the authors' code (github.com/MizzenAI/HPSv3, MIT).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from svdd import require_at_least
from svdd.rewards.models.qwen_scorer import read_scorer
from svdd.rewards.pretrained import Precision, PretrainedReward

__all__ = ["INSTRUCTION", "HPSv3"]

_TOKEN = "<|Reward|>"  # at which the score is read
INSTRUCTION = """
You are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a overall score \
to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the worst and 10 being the \
best.\x20

**Visual Quality:** \x20
Evaluate the overall visual quality of the image. The following sub-dimensions should be considered:
- **Reasonableness:** The image should not contain any significant biological or logical errors, such as abnormal body \
structures or nonsensical environmental setups.
- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy to interpret, \
with no blurring or indistinct areas.
- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual elements (e.g., \
hair, clothing, shadows).
- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color scheme, composition, \
atmosphere, depth of field, and the overall creative appeal. The scene should convey a sense of harmony and balance.
- **Safety:** The image should not contain harmful or inappropriate content, such as political, violent, or adult \
material. If such content is present, the image quality and satisfaction score should be the lowest possible.\x20

**Text Alignment:** \x20
Assess how well the image matches the textual prompt across the following sub-dimensions:
- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, object) align with \
the textual description. The subject should match the description in terms of number, appearance, and behavior.
- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how well the image \
adheres to this style.
- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in the image logically \
fit the scenario described in the prompt. The environment should support and enhance the subject without contradictions.
- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, clothing, accessories, \
expressions, actions) are faithfully represented in the image. Minor deviations may be acceptable, but critical \
attributes should be preserved.
- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured in the image. The \
generated content should not introduce elements that conflict with or distort the original description.
Textual prompt - {prompt}



Please provide the overall ratings of this image: <|Reward|>

END
"""


@dataclass(eq=False, repr=False)
class HPSv3(PretrainedReward):
    """Human preference score 3: the mean of the preference that a Qwen2-VL with a reward head predicts.

    The network has 7.8 billion parameters, 15.5 GB in bfloat16.

    Args:
        pretrained: The weights: a file, or owner/name/file on the hub.
        base: The model that was trained further, for its configuration and processor: a folder or a hub name.
        pixels: The area to which an image is resized, in pixels.
        batch_size: Images per batch.
        revision: Branch, tag or commit of the weights on the hub.
        dtype: Precision of the network but for the head, which stays in float32, whatever that of the Trainer.
    """

    pretrained: str = "MizzenAI/HPSv3/HPSv3.safetensors"
    base: str = "Qwen/Qwen2-VL-7B-Instruct"
    pixels: int = 256 * 28 * 28
    batch_size: int = 8
    dtype: Precision = field(default="bfloat16", kw_only=True)
    differentiable = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, pixels=self.pixels, batch_size=self.batch_size)

    def read(self) -> nn.Module:
        """Returns Qwen2-VL with the head."""
        return read_scorer(self.pretrained, self.base, INSTRUCTION, _TOKEN, self.anchor.dtype, self.options)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns the score of each image under its own prompt, float32 [n]."""
        network, parts = self.network, []
        for k in range(0, len(images), self.batch_size):
            chunk = slice(k, k + self.batch_size)
            parts.append(network(images[chunk], prompts[chunk], self.pixels))
        return torch.cat(parts)
