"""A vision-language model's log-odds of yes against no when asked whether the image shows the prompt.

Sources: Lin et al., Evaluating Text-to-Visual Generation with Image-to-Text Generation, 2024, arXiv 2404.01291;
Black et al., Training Diffusion Models with Reinforcement Learning, 2023, arXiv 2305.13301.
"""

from dataclasses import dataclass

from torch import Tensor

from svdd.rewards.question import QuestionReward

__all__ = ["VLMJudge"]


@dataclass(eq=False, repr=False)
class VLMJudge(QuestionReward):
    """Log-odds of "yes" against "no" when a vision-language model is asked about the image.

    Args:
        pretrained: A local model: a folder or a hub name of an image-text-to-text model of transformers, or of BLIP for
            visual question answering. Default: `Qwen/Qwen2-VL-2B-Instruct`.
    """

    default = "Qwen/Qwen2-VL-2B-Instruct"

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns the log-odds for each image and its own prompt, float32 [n]."""
        return self.log_odds(images, self.questions(prompts))
