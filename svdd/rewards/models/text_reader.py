"""Text in pictures, read by RapidOCR with the weights inside its wheel.

Source: PP-OCR of PaddlePaddle (Cui et al., PaddleOCR 3.0 Technical Report, 2025, arXiv 2507.05595): a detector finds
lines of text, a recogniser with a CTC head reads them (Graves et al., Connectionist Temporal Classification, 2006).
Weights and package: Apache-2.0.
"""

from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from svdd import UserError, first_line
from svdd.rewards.models.onnx import require_package

__all__ = ["TextReader", "bundled_weights", "enlarge"]

_EXTRA = "ocr"
_FAINT = 0.3  # a line that the detector is less sure of is not read; the recogniser decides about the others
_EDGE = 0.2  # a pixel that is less probably text belongs to no line


class TextReader:
    """Reads pictures with one detector and one recogniser, both in ONNX, in one thread per call.

    Args:
        detector: File of a text detector of PP-OCR.
        recognizer: File of a text recogniser of PP-OCR, with its characters in the metadata.

    Raises:
        UserError: If RapidOCR is missing, or a file is no such network.
    """

    def __init__(self, detector: Path, recognizer: Path) -> None:
        rapidocr = require_package("rapidocr", _EXTRA)
        require_package("onnxruntime", _EXTRA)
        threads = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": 1 for kind in ("intra", "inter")}
        files = {"Det.model_path": str(detector), "Rec.model_path": str(recognizer)}  # a given file is never downloaded
        limits = {"Det.limit_side_len": 32, "Det.thresh": _EDGE, "Det.box_thresh": _FAINT}
        try:
            self.engine = rapidocr.RapidOCR(params={"Global.log_level": "critical", **threads, **files, **limits})
            self.detect, self.recognize = self.engine._load_det_model(), self.engine._load_rec_model()
            self.characters: list[str] = self.recognize.postprocess_op.character  # the first is CTC's blank
            place = self.characters.index(" ")
            self.space = np.eye(1, len(self.characters), place, dtype=np.float32)[0]  # of a line break
        except Exception as error:  # of onnxruntime and of RapidOCR
            what = f"detector={str(detector)!r} and recognizer={str(recognizer)!r} are not networks of PP-OCR in ONNX"
            raise UserError(f"{what}: {first_line(error)}") from error

    def __call__(self, image: Tensor) -> np.ndarray:
        """Reads an image, uint8 [3, h, w], line by line from top to bottom, with a space between two lines.

        Returns the probabilities of all characters at each letter that was read, float32 [m, characters]. The most
        probable one is the letter.
        """
        pixels = np.ascontiguousarray(image.flip(0).permute(1, 2, 0).cpu().numpy())  # in the order of OpenCV, BGR
        boxes = self.detect(pixels).boxes
        found: list[np.ndarray] = []
        for crop in [] if boxes is None else self.engine.crop_text_regions(pixels, boxes):
            found += [*([self.space] if found else []), *_places(self._line(crop))]
        return np.stack(found) if found else np.zeros((0, len(self.characters)), dtype=np.float32)

    def _line(self, crop: np.ndarray) -> np.ndarray:
        """Returns the probabilities of all characters along a line of text, float32 [t, characters]."""
        _, height, width = self.recognize.rec_image_shape  # shorter lines are padded
        ratio = max(width / height, crop.shape[1] / crop.shape[0])
        return self.recognize.session(self.recognize.resize_norm_img(crop, ratio)[None])[0]


def _places(line: np.ndarray) -> list[np.ndarray]:
    """Returns the probabilities at each letter of a line: a run of one character without blanks, where it is surest."""
    best = line.argmax(1)
    starts = np.flatnonzero(np.diff(best, prepend=-1))
    runs = zip(starts, [*starts[1:], len(best)], strict=True)
    return [line[first + line[first:end, best[first]].argmax()] for first, end in runs if best[first]]


def bundled_weights() -> tuple[Path, Path]:
    """Returns the detector and the recogniser in RapidOCR's wheel; raises UserError if RapidOCR is missing."""
    folder = Path(require_package("rapidocr", _EXTRA).__file__).parent / "models"
    return folder / "PP-OCRv6_det_small.onnx", folder / "PP-OCRv6_rec_small.onnx"


def enlarge(images: Tensor, side: int) -> Tensor:
    """Returns images of at least the area of a square, as uint8 [n, 3, h, w], from float [n, 3, h, w] in [0, 1]."""
    height, width = images.shape[-2:]
    factor = side / (height * width) ** 0.5
    if factor > 1:
        size = [round(factor * extent) for extent in (height, width)]
        images = F.interpolate(images.float(), size=size, mode="bicubic", align_corners=False)
    return (images.detach().float().clamp(0, 1) * 255).round().byte()
