"""Prompts, seeds and negative prompts as a notebook gives them, one entry per image."""

from collections.abc import Sequence
from typing import NamedTuple

from svdd import UserError, is_integer, require_at_least
from svdd.runs.bounds import check_images
from svdd.runs.rows import Prompt

__all__ = ["Request", "requests"]


class Request(NamedTuple):
    """One image to draw."""

    prompt: str
    seed: int
    negative_prompt: str | None


def requests(
    prompts: Sequence[str] | str,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    num_images: int = 1,
    negative_prompts: Sequence[str | None] | str | None = None,
) -> list[Request]:
    """Returns `num_images` images of each prompt in turn; `GuidedDiffusion.sample` explains the arguments.

    Raises:
        UserError: If there is no prompt, or an argument is of another type or length.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts or not all(isinstance(text, str) for text in texts):
        bad = next((text for text in texts if not isinstance(text, str)), texts)
        raise UserError(f"prompts must be a text or a list of at least one, got {bad!r}")
    require_at_least(1, num_images=num_images)
    check_images(1, num_images)
    if negative_prompts is None or isinstance(negative_prompts, str):
        negatives: list[str | None] = [negative_prompts] * len(texts)
    else:
        negatives = list(negative_prompts)
    if len(negatives) != len(texts) or not all(text is None or isinstance(text, str) for text in negatives):
        expected = f"a text for all prompts, or a list with a text or None for each ({len(texts)})"
        raise UserError(f"negative_prompts must be {expected}, got {negative_prompts!r}")
    count, total = num_images, num_images * len(texts)
    given = None if seeds is None else list(seeds)
    if given is not None and (len(given) not in (len(texts), total) or not all(map(is_integer, given))):
        expected = f"one integer per prompt ({len(texts)})" + (f" or per image ({total})" if count > 1 else "")
        raise UserError(f"seeds must be {expected}, got {seeds!r}")
    if given is not None and len(given) == total:
        chosen = given
    else:
        require_at_least(0, seed=seed)
        own: Sequence[int | None] = given or [None] * len(texts)
        rows = [Prompt(p, text, None, own[p], {}) for p, text in enumerate(texts)]
        chosen = [each for row in rows for each in row.image_seeds(seed, count)]
    return [Request(texts[k // count], chosen[k], negatives[k // count]) for k in range(total)]
