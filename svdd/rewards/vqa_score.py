"""VQAScore: the probability of the answer "Yes" when a model is asked whether the image shows the prompt.

    VQAScore(image, text) = p("Yes" | image, 'Does this figure show "{text}"? Please answer yes or no.')

Source: Lin et al., Evaluating Text-to-Visual Generation with Image-to-Text Generation, 2024, arXiv 2404.01291.
"""

import math
from dataclasses import dataclass, field

from torch import Tensor, nn

from svdd.rewards.models.local_vlm import LocalVLM
from svdd.rewards.pretrained import Precision
from svdd.rewards.question import QuestionReward

__all__ = ["VQAScore"]


@dataclass(eq=False, repr=False)
class VQAScore(QuestionReward):
    """Probability of the answer "Yes" when a vision-language model is asked whether the image shows the prompt.

    Args:
        pretrained: A local model: a folder or a hub name of an image-text-to-text model of transformers, or of BLIP for
            visual question answering. Default: `Qwen/Qwen2.5-VL-7B-Instruct`.
        question: The question; `{prompt}` stands for the prompt.
        answer: The answer whose probability is the score: a single token of the model. The authors use `yes` for
            InstructBLIP and `Yes` for all others.
        logit: Return log(p / (1 - p)), which is unbounded, instead of the probability p.
        dtype: Precision of a local model, whatever that of the Trainer.
    """

    question: str = 'Does this figure show "{prompt}"? Please answer yes or no.'
    answer: str = "Yes"
    logit: bool = False
    dtype: Precision = field(default="bfloat16", kw_only=True)
    default = "Qwen/Qwen2.5-VL-7B-Instruct"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.range = (-math.inf, math.inf) if self.logit else (0.0, 1.0)

    def read(self) -> nn.Module:
        """Returns the local model; raises UserError if the answer is not a token of it."""
        network = super().read()
        if isinstance(network, LocalVLM):
            network.spell(self.answer)
        return network

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns the answer's probability or its logit for each image and its own prompt, float32 [n]."""
        answers = self.ask(images, self.questions(prompts), self.answer)
        return answers.exact - answers.other if self.logit else answers.exact.exp()
