"""Limits of what a run takes in, so that a mistake is an error at once instead of minutes and gigabytes later."""

from svdd import check_bound

__all__ = ["check_images"]

MAX_COLUMNS = 1_000  # of a prompt, each copied into its results
MAX_DEPTH = 32  # of lists and objects in a column
MAX_LINE = 2**24  # characters of a line of text; a longer one means a binary file
MAX_RECORD = 2**20  # bytes of a prompt with its columns, written again with each of its images
MAX_JSON_FILE = 2**28  # bytes of a file that is read as a whole
MAX_IMAGES_PER_PROMPT = 10_000  # drawn and written together
MAX_IMAGES = 10**8  # of a run
MAX_WORKERS = 256  # processes that read prompts
MAX_PICTURE_BYTES = 2**30
MAX_PIXELS_AT_ONCE = 2**26  # of pictures of one size, while there are several


def check_images(prompts: int, images_per_prompt: int) -> None:
    """Raises a UserError if a run would draw too many images for a prompt or in all."""
    check_bound("images_per_prompt", images_per_prompt, MAX_IMAGES_PER_PROMPT, "repeat the prompts in their file")
    check_bound("prompts x images_per_prompt", prompts * images_per_prompt, MAX_IMAGES, "split the prompts into runs")
