"""A Qwen2-VL with a reward head: images as tensors, so that gradients flow from the score to the pixels.

Source: Wang et al., Qwen2-VL: Enhancing Vision-Language Model's Perception of the World at Any Resolution, 2024, arXiv
2409.12191.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdd import UserError
from svdd.assets.hub import check_loaded, find_file, fit_weights, loading, read_auto, read_weights
from svdd.rewards.models.pixels import normalise

__all__ = ["Scorer", "patches", "read_scorer", "smart_size"]

_HEAD = "rm_head."


class Scorer(nn.Module):
    """Qwen2-VL, and a head that reads its state at a special token of an instruction."""

    def __init__(self, backbone: Any, processor: Any, instruction: str, token: str) -> None:
        super().__init__()
        self.backbone, self.processor = backbone, processor
        self.head = Head(backbone.config.text_config.hidden_size)
        content = [{"type": "image"}, {"type": "text", "text": instruction}]
        turn = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        self.template = text[: text.index(token) + len(token)]  # attention is causal: the rest has no effect

    def forward(self, images: Tensor, prompts: list[str], area: int) -> Tensor:
        """Returns the mean of the preference for each image, resized to an area in pixels, float32 [n]."""
        device, how = images.device, self.processor.image_processor
        height, width = images.shape[-2:]
        size = smart_size(height, width, how.patch_size * how.merge_size, area)
        if size != (height, width):
            images = F.interpolate(images.float(), size, mode="bicubic", antialias=True, align_corners=False)
        pixels = patches(normalise(images.clamp(0, 1), how.image_mean, how.image_std), how)
        grid = torch.tensor([[1, *(side // how.patch_size for side in size)]], device=device)
        token = self.processor.image_token
        template = self.template.replace(token, token * (int(grid.prod()) // how.merge_size**2))
        texts = [template.replace("{prompt}", prompt) for prompt in prompts]
        tokens = self.processor.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").to(device)
        ids, last = tokens.input_ids, tokens.attention_mask.sum(1) - 1
        states = self.backbone(
            input_ids=ids,  # no mask: attention is causal, and padding to the right of the token is not seen
            position_ids=torch.arange(ids.shape[1], device=device).expand(3, *ids.shape),  # as in the authors' code
            pixel_values=pixels.to(self.backbone.dtype),
            image_grid_thw=grid.expand(len(ids), -1),
            use_cache=False,
        ).last_hidden_state
        return self.head(states[torch.arange(len(ids), device=device), last].float())[:, 0]


class Head(nn.Sequential):
    """The layers that return mean and spread of the preference, [n, 2]; conversions leave them in float32."""

    def __init__(self, width: int) -> None:
        dropout = nn.Identity()
        super().__init__(nn.Linear(width, 1024), nn.ReLU(), dropout, nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2))

    def _apply(self, fn: Any, recurse: bool = True) -> "Head":
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), recurse)


def smart_size(height: int, width: int, factor: int, area: int) -> tuple[int, int]:
    """Returns the multiples of `factor` nearest to an area in pixels, at about the same ratio of the sides.

    Raises:
        UserError: If one side is more than 200 times the other.
    """
    if max(height, width) > 200 * min(height, width):
        raise UserError(f"an image is {width} x {height} pixels; expected sides that differ by a factor of 200 at most")
    rows, columns = (max(factor, round(side / factor) * factor) for side in (height, width))
    if rows * columns > area:
        shrink = math.sqrt(height * width / area)
        rows, columns = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif rows * columns < area:
        grow = math.sqrt(area / (height * width))
        rows, columns = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return rows, columns


def patches(images: Tensor, how: Any) -> Tensor:
    """Returns the patches of normalised images in the order of an image processor, [n * patches, numbers].

    Patches that the model merges follow each other, and each stands as often as the processor has frames in a patch.
    """
    count, colours, height, width = images.shape
    side, merged = how.patch_size, how.merge_size
    rows, columns = (extent // side // merged for extent in (height, width))
    cut = images.reshape(count, colours, rows, merged, side, columns, merged, side).permute(0, 2, 5, 3, 6, 1, 4, 7)
    frames = cut.unsqueeze(6).expand(*[-1] * 6, how.temporal_patch_size, -1, -1)
    return frames.reshape(count * rows * columns * merged**2, -1)


def read_scorer(
    pretrained: str, base: str, instruction: str, token: str, dtype: torch.dtype, options: dict[str, Any]
) -> Scorer:
    """Returns a Qwen2-VL with weights and head from one file; raises UserError if they cannot be loaded.

    Args:
        pretrained: The file, or owner/name/file on the hub.
        base: Folder or hub name of the model that was trained further: its configuration and processor are read.
        instruction: The instruction, with `{prompt}` and the special token.
        token: The special token, which was added to the words.
        dtype: Precision of all but the head.
        options: For the file on the hub.
    """
    from transformers import AutoConfig, AutoProcessor, Qwen2VLForConditionalGeneration
    from transformers.tokenization_utils_base import AddedToken

    what, local = f"base={base!r}", {"local_files_only": options["local_files_only"]}
    config = read_auto(AutoConfig, base, what, **local)
    if config.model_type != "qwen2_vl":
        raise UserError(f"{what} is a {config.model_type} model; expected a Qwen2-VL")
    processor = read_auto(AutoProcessor, base, what, **local)
    processor.tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
    state, source = read_weights(find_file(pretrained, **options)), repr(pretrained)
    head = {name.removeprefix(_HEAD): state.pop(name) for name in list(state) if name.startswith(_HEAD)}
    words = next((tensor for name, tensor in state.items() if name.endswith(".embed_tokens.weight")), None)
    if words is None or not head:
        raise UserError(f"{source} holds no words or no reward head; expected HPSv3.safetensors")
    if len(words) < (known := len(processor.tokenizer)):
        raise UserError(f"{source} has {len(words)} words, but the tokenizer of {base!r} has {known} with {token}")
    config.text_config.vocab_size = len(words)
    kind: Any = Qwen2VLForConditionalGeneration
    with loading(source):  # of either layout of names: transformers has changed them
        model, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
    check_loaded("Qwen2-VL", info, source)
    scorer = Scorer(model.model, processor, instruction, token)
    fit_weights(scorer.head, head, pretrained)
    return scorer
