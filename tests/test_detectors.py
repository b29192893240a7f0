"""Detectors of transformers behind one interface: tiny random models of the published classes."""

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForObjectDetection, AutoProcessor, Owlv2ForObjectDetection

from svdd import UserError
from svdd.rewards.models.detectors import Detection, read_detector, suppressed
from tests.tested_rewards import as_pil, pictures
from tests.tiny_detectors import TINY_DETECTORS

OPTIONS = {"local_files_only": True}


@pytest.fixture(scope="session")
def detectors(tmp_path_factory):
    """Folders of tiny detectors by name, saved at first use."""
    saved: dict[str, str] = {}

    def folder(name: str) -> str:
        if name not in saved:
            saved[name] = TINY_DETECTORS[name](tmp_path_factory.mktemp(name))
        return saved[name]

    return folder


@pytest.mark.parametrize("kind", TINY_DETECTORS)
def test_objects_are_named_ordered_and_independent_of_the_batch(detectors, kind):
    detector = read_detector(detectors(kind), OPTIONS).eval()
    images = pictures(3, 48, 80)
    names = [["disc", "tv"], ["tv"], ["disc", "tv"]]
    found = detector.detect(images, names, 0.05, batch_size=2)
    assert sum(map(len, found)) > 3
    for objects, asked, image in zip(found, names, images, strict=True):
        assert {one.label for one in objects} <= {*asked}
        scores = [one.score for one in objects]
        assert scores == sorted(scores, reverse=True)
        assert all(0.05 <= score <= 1 for score in scores)
        alone = detector.detect(image[None], [asked], 0.05)[0]
        assert [one.label for one in alone] == [one.label for one in objects]
        torch.testing.assert_close([one.score for one in alone], scores, atol=1e-4, rtol=0)
        for one in objects:
            assert (one.mask is not None) == (kind == "mask2former")
            if one.mask is not None:
                left, top, right, bottom = one.box
                rows, columns = np.nonzero(one.mask.numpy())
                assert (left, top, right, bottom) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    most = max(one.score for objects in found for one in objects)
    assert detector.detect(images, [[]] * 3, 0.05) == [[], [], []]
    assert detector.detect(images, names, most + 1e-3) == [[], [], []]


@pytest.mark.parametrize("kind", ["detr", "owl"])
def test_objects_are_those_of_transformers_own_path(detectors, kind):
    """8-bit pictures through the whole processor, text included, give the same scores and boxes."""
    folder, image = detectors(kind), (pictures(1, 64, 64) * 255).round() / 255
    if kind == "detr":
        processor, model = (
            AutoImageProcessor.from_pretrained(folder),
            AutoModelForObjectDetection.from_pretrained(folder),
        )
        inputs = processor(images=as_pil(image), return_tensors="pt")
    else:
        processor, model = AutoProcessor.from_pretrained(folder), Owlv2ForObjectDetection.from_pretrained(folder)
        inputs = processor(text=[["a photo of a tv"]], images=as_pil(image), return_tensors="pt")
        processor = processor.image_processor
    with torch.no_grad():
        (theirs,) = processor.post_process_object_detection(model.eval()(**inputs), 0.1, [(64, 64)])
    found = read_detector(folder, OPTIONS).eval().detect(image, [["tv"]], 0.1)[0]
    kept = theirs["labels"] == (1 if kind == "detr" else 0)
    order = theirs["scores"][kept].argsort(descending=True)
    assert len(found) == len(order) > 0
    torch.testing.assert_close(torch.tensor([one.score for one in found]), theirs["scores"][kept][order])
    torch.testing.assert_close(
        torch.tensor([one.box for one in found]), theirs["boxes"][kept][order], atol=1e-3, rtol=0
    )


def test_grounding_dino_gives_a_box_the_name_with_the_best_token(detectors):
    folder, image = detectors("grounding_dino"), pictures(1, 64, 64)
    detector = read_detector(folder, OPTIONS).eval()
    names = ("tv set", "owl", "Disc.")
    words, spans = detector._tokens(names)
    text = detector.tokenizer.convert_ids_to_tokens(words.input_ids[0])
    joined = ["".join(text[k].removeprefix("##") for k in span) for span in spans]
    assert joined == ["tvset", "owl", "disc"]
    found = detector.detect(image, [names], 0.0)[0]
    pixels = detector.processor(images=as_pil(image), return_tensors="pt")
    with torch.no_grad():
        scores = detector.model(**pixels, **words).logits.sigmoid()[0]  # [queries, tokens]
    best = torch.stack([scores[:, span].amax(1) for span in spans], 1)
    value, label = best.max(1)
    order = value.argsort(descending=True)
    torch.testing.assert_close(torch.tensor([one.score for one in found]), value[order], atol=1e-4, rtol=0)
    assert [one.label for one in found] == [names[k] for k in label[order]]
    with pytest.raises(UserError, match=r"20 names have .* tokens, but Grounding DINO reads 64: ask for fewer"):
        detector.detect(image, [[f"object {k}" for k in range(20)]], 0.1)
    with pytest.raises(UserError, match="is no name of an object"):
        detector.detect(image, [["owl", " . "]], 0.1)


def test_an_object_that_overlaps_a_better_one_of_its_label_is_suppressed():
    """Two squares of 10 x 10 that share half of their area overlap by 50 / 150."""
    boxes = {"a": (0, 0, 10, 10), "b": (5, 0, 15, 10), "c": (0, 0, 10, 10)}
    objects = [Detection("cat", 0.9, boxes["a"]), Detection("cat", 0.8, boxes["b"]), Detection("dog", 0.7, boxes["c"])]
    assert suppressed(objects, 0.3) == [objects[0], objects[2]]
    assert suppressed(objects, 0.4) == objects
    assert suppressed(objects, 1.0) == objects


def test_wrong_models_and_unknown_classes_are_one_line(detectors, tiny_clip):
    with pytest.raises(UserError, match=r"is a CLIPModel model; expected a zero-shot detector"):
        read_detector(tiny_clip, OPTIONS)
    with pytest.raises(UserError, match=r"'\./nowhere' is not a folder"):
        read_detector("./nowhere", OPTIONS)
    for kind in ("detr", "mask2former"):
        with pytest.raises(UserError, match=r"'discs' is none of the 3 classes .* did you mean 'disc'"):
            read_detector(detectors(kind), OPTIONS).eval().detect(pictures(1), [["discs"]], 0.5)
