"""Object detectors and instance segmenters of transformers behind one interface.

Sources: Liu et al., Grounding DINO, 2023, arXiv 2303.05499; Minderer et al., Scaling Open-Vocabulary Object Detection,
2023, arXiv 2306.09683 (OWLv2); Carion et al., End-to-End Object Detection with Transformers, 2020, arXiv 2005.12872
(DETR); Cheng et al., Masked-attention Mask Transformer, 2022, arXiv 2112.01527 (Mask2Former).
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from svdd import UserError, did_you_mean
from svdd.assets.hub import check_tokenizer, read_auto, read_model

__all__ = ["Detection", "Detector", "read_detector", "suppressed"]

_SPARE = r"position_ids$|relative_position_index$|num_batches_tracked$"  # buffers in published files, without effect
_SAME = (  # COCO's classes as different detectors and benchmarks call them
    ("airplane", "aeroplane"),
    ("motorcycle", "motorbike"),
    ("couch", "sofa"),
    ("tv", "television", "tvmonitor"),
    ("mouse", "computer mouse"),
    ("keyboard", "computer keyboard"),
    ("remote", "tv remote", "remote control"),
    ("hair drier", "hair dryer"),
    ("donut", "doughnut"),
)
_NAMES = {name.replace(" ", ""): names[0].replace(" ", "") for names in _SAME for name in names}


@dataclass(frozen=True)
class Detection:
    """An object that a detector has found in an image.

    Attributes:
        label: What was found, as it was asked for.
        score: The detector's confidence, in [0, 1].
        box: Left, top, right and bottom in pixels; it may reach beyond the image.
        mask: The object's pixels, bool [h, w], on the CPU; None if the detector finds boxes only.
    """

    label: str
    score: float
    box: tuple[float, float, float, float]
    mask: Tensor | None = None


class Detector(nn.Module):
    """Finds named objects in images.

    Args:
        model: A model of transformers.
        processor: Its image processor, or that of images and text.

    Attributes:
        reads_names: Whether the names are an input of the model; else it finds all of its classes at once.
    """

    model: Any
    tokenizer: Any
    reads_names = False

    def __init__(self, model: nn.Module, processor: Any) -> None:
        super().__init__()
        self.model, self.processor = model, getattr(processor, "image_processor", processor)
        self.tokenizer = getattr(processor, "tokenizer", None)

    def detect(
        self,
        images: Tensor,
        labels: Sequence[Sequence[str]],
        threshold: float,
        overlap: float = 1.0,
        batch_size: int = 8,
    ) -> list[list[Detection]]:
        """Returns the objects in each image, those of the highest score first.

        Images with equal labels are processed together. What is found in one does not depend on the others, but for
        rounding.

        Args:
            images: float32 [n, 3, h, w] in [0, 1].
            labels: What to look for in each image.
            threshold: The lowest score of an object.
            overlap: Of two boxes of a label with a larger intersection over union the better is kept; 1 keeps all.
            batch_size: Images per batch.

        Raises:
            UserError: If a closed-set model does not know a label.
        """
        rows = defaultdict(list)
        for k, names in enumerate(labels):
            rows[tuple(dict.fromkeys(names))].append(k)
        found: dict[int, list[Detection]] = {}
        for names, members in rows.items():
            for part in (members[k : k + batch_size] for k in range(0, len(members), batch_size)):
                objects = self._detect(images[part].float(), names, threshold) if names else [[] for _ in part]
                found.update(zip(part, objects, strict=True))
        return [suppressed(found[k], overlap) for k in range(len(images))]

    @torch.no_grad()
    def _detect(self, images: Tensor, names: tuple[str, ...], threshold: float) -> list[list[Detection]]:
        words, classes = self.inputs(names), self.classes(names)
        inputs = self.processor(images=list(images.detach()), do_rescale=False, return_tensors="pt")
        inputs = inputs.to(images.device, next(self.model.parameters()).dtype)
        for name, tensor in words.items():
            inputs[name] = tensor.to(images.device).repeat(len(images), 1)
        outputs = self.model(**inputs)
        for name, tensor in outputs.items():
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                outputs[name] = tensor.float()
        found = self.objects(outputs, classes, threshold, [tuple(images.shape[-2:])] * len(images))
        return [sorted(objects, key=lambda one: -one.score) for objects in found]

    def inputs(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Returns the model's inputs for these names, for one image."""
        return {}

    def classes(self, names: tuple[str, ...]) -> dict[int, str]:
        """Returns the names by the index of their class in the outputs; raises UserError if there is no such class."""
        return dict(enumerate(names))

    def objects(
        self, outputs: Any, classes: dict[int, str], threshold: float, sizes: list[tuple[int, ...]]
    ) -> list[list[Detection]]:
        """Returns each image's objects of these classes by the processor's own post-processing.

        Args:
            outputs: The model's.
            classes: Names by class.
            threshold: The lowest score of an object.
            sizes: Each image's height and width.
        """
        found = []
        for result in self.processor.post_process_object_detection(outputs, threshold=threshold, target_sizes=sizes):
            columns = (result[name].tolist() for name in ("labels", "scores", "boxes"))
            rows = [row for row in zip(*columns, strict=True) if row[0] in classes]
            found.append([Detection(classes[label], score, tuple(box)) for label, score, box in rows])
        return found


class GroundingDino(Detector):
    """Grounding DINO, which reads all names as one text, `cat. dog.`, and gives each box a score for every token.

    A box has the name with the highest score of one of its tokens. transformers' processor decodes the tokens above a
    threshold instead, which may return parts of names and mixtures of several.
    """

    reads_names = True

    def _tokens(self, names: Iterable[str]) -> tuple[Any, list[list[int]]]:
        """Returns the tokenised text, and which tokens belong to each name."""
        plain = [" ".join(name.lower().replace(".", " ").split()) for name in names]
        words = self.tokenizer(". ".join(plain) + ".", return_offsets_mapping=True, return_tensors="pt")
        most, count = self.model.config.max_text_len, words.input_ids.shape[1]
        if count > most:
            raise UserError(f"{len(plain)} names have {count} tokens, but Grounding DINO reads {most}: ask for fewer")
        offsets, start, spans = words.pop("offset_mapping")[0].tolist(), 0, []
        for name in plain:
            spans.append([k for k, (left, right) in enumerate(offsets) if start <= left < right <= start + len(name)])
            start += len(name) + 2
            if not spans[-1]:
                raise UserError(f"{name!r} is no name of an object: it has no letters")
        return words, spans

    def inputs(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Returns the tokens; raises UserError if there are too many."""
        return dict(self._tokens(names)[0])

    def objects(
        self, outputs: Any, classes: dict[int, str], threshold: float, sizes: list[tuple[int, ...]]
    ) -> list[list[Detection]]:
        """Returns each image's objects."""
        spans = self._tokens(classes.values())[1]
        outputs["logits"] = torch.stack([outputs.logits[..., span].amax(-1) for span in spans], -1)
        return super().objects(outputs, classes, threshold, sizes)


class Owl(Detector):
    """OWLv2 and OWL-ViT, which compare every patch's box with the text `a photo of a cat` for each name."""

    reads_names = True

    def inputs(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Returns the tokens, a row for each name."""
        texts = [f"a photo of {'an' if name[:1].lower() in 'aeiou' else 'a'} {name}" for name in names]
        length = self.model.config.text_config.max_position_embeddings
        options = {"padding": "max_length", "truncation": True, "max_length": length}
        return dict(self.tokenizer(texts, return_tensors="pt", return_token_type_ids=False, **options))


class ClosedSet(Detector):
    """A detector of a fixed set of classes, such as DETR and RT-DETR."""

    def classes(self, names: tuple[str, ...]) -> dict[int, str]:
        """Returns the names by the index of the class that they mean; raises UserError if there is no such class."""
        labels = self.model.config.id2label
        known = {_normal(label): index for index, label in labels.items()}
        for name in names:
            if _normal(name) not in known:
                some = ", ".join(repr(label) for label in [*labels.values()][:5])
                problem = f"{name!r} is none of the {len(labels)} classes of the detector, such as {some}"
                raise UserError(f"{problem}{did_you_mean(name, labels.values())}")
        return {known[_normal(name)]: name for name in names}


class Segmenter(ClosedSet):
    """An instance segmenter of a fixed set of classes, such as Mask2Former; a box encloses its mask."""

    def objects(
        self, outputs: Any, classes: dict[int, str], threshold: float, sizes: list[tuple[int, ...]]
    ) -> list[list[Detection]]:
        """Returns each image's objects."""
        options = {"threshold": threshold, "target_sizes": sizes, "return_binary_maps": True}
        found = []
        for result in self.processor.post_process_instance_segmentation(outputs, **options):
            segments = result["segments_info"]
            masks = result["segmentation"].bool().cpu() if segments else []
            pairs = [(one, mask) for one, mask in zip(segments, masks, strict=True) if one["label_id"] in classes]
            found.append([Detection(classes[one["label_id"]], one["score"], _box(mask), mask) for one, mask in pairs])
        return found


def read_detector(pretrained: str, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> Detector:
    """Returns a zero-shot detector, a closed-set detector or an instance segmenter of transformers, on the CPU.

    Args:
        pretrained: A folder or a hub name.
        options: `revision` and `local_files_only`.
        dtype: Of the weights.

    Raises:
        UserError: If it is another kind of model or cannot be loaded.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoProcessor
    from transformers import AutoModelForObjectDetection as Boxes
    from transformers import AutoModelForUniversalSegmentation as Masks
    from transformers import AutoModelForZeroShotObjectDetection as ZeroShot

    config = read_auto(AutoConfig, pretrained, **options)
    own = {*(config.architectures or ())}
    kinds = [
        kind
        for kind in (ZeroShot, Boxes, Masks)
        if type(config) in kind._model_mapping and (not own or _names(kind._model_mapping[type(config)]) & own)
    ]
    shape = config.model_type.replace("_", "-")
    readers = {"grounding-dino": GroundingDino, "mm-grounding-dino": GroundingDino, "owlv2": Owl, "owlvit": Owl}
    if not kinds or (kinds[0] is ZeroShot and shape not in readers):
        what = f"pretrained={pretrained!r} is a {', '.join(sorted(own)) or shape} model"
        kinds_known = "zero-shot detector (Grounding DINO, OWLv2), an object detector (DETR, RT-DETR)"
        raise UserError(f"{what}; expected a {kinds_known} or an instance segmenter (Mask2Former)")
    if kinds[0] is Masks and find_spec("scipy") is None:
        raise UserError(f"pretrained={pretrained!r} needs the scipy package: pip install 'svdd[segmentation]'")
    model = read_model(kinds[0], pretrained, dtype, spare=_SPARE, **options)
    if kinds[0] is not ZeroShot:
        detector: Any = Segmenter if kinds[0] is Masks else ClosedSet
        return detector(model, read_auto(AutoImageProcessor, pretrained, **options))
    processor = read_auto(AutoProcessor, pretrained, **options)
    if not hasattr(processor, "tokenizer"):
        raise UserError(f"pretrained={pretrained!r} has no processor for images and text")
    check_tokenizer(processor.tokenizer, f"the tokenizer of {pretrained!r}", config.text_config.vocab_size)
    return readers[shape](model, processor)


def suppressed(objects: Sequence[Detection], overlap: float) -> list[Detection]:
    """Returns the objects without those that overlap a better one of the same label more than this (IoU)."""
    if overlap >= 1 or len(objects) < 2:
        return list(objects)
    from torchvision.ops import batched_nms

    names = {name: k for k, name in enumerate(dict.fromkeys(found.label for found in objects))}
    boxes, scores = (
        torch.tensor([getattr(found, name) for found in objects], dtype=torch.float) for name in ("box", "score")
    )
    kept = batched_nms(boxes, scores, torch.tensor([names[found.label] for found in objects]), overlap)
    return [objects[k] for k in sorted(kept.tolist())]


def _box(mask: Tensor) -> tuple[float, float, float, float]:
    """Returns the box around the pixels of a mask that is not empty."""
    rows, columns = mask.any(1).nonzero().flatten().tolist(), mask.any(0).nonzero().flatten().tolist()
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def _normal(name: str) -> str:
    """Returns the name of a class without what differs between detectors."""
    plain = "".join(character for character in name.lower() if character.isalnum())
    return _NAMES.get(plain, plain)


def _names(classes: Any) -> set[str]:
    """Returns the names of a model class, or of several."""
    return {each.__name__ for each in (classes if isinstance(classes, list | tuple) else [classes])}
