"""VQAScore and HPSv3 against computations with plain transformers."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BlipForQuestionAnswering,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from svdd import UserError
from svdd.__main__ import main
from svdd.rewards.hps_v3 import INSTRUCTION, HPSv3
from svdd.rewards.models.qwen_scorer import patches, smart_size
from svdd.rewards.vlm_judge import VLMJudge
from svdd.rewards.vqa_score import VQAScore
from tests.tested_rewards import PROMPTS, as_pil, pictures, serving
from tests.tiny_reward_models import (
    HPS_V3_TOKEN,
    chat_server,
    logprobs,
    seen_and_asked,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders of tiny models by name, saved at first use."""
    with serving(tmp_path_factory.mktemp) as found:
        yield found


# ---- VQAScore

QUESTION = 'Does this figure show "{}"? Please answer yes or no.'


@torch.no_grad()
def plain_vqa_score(name: str, model, processor, image, prompt: str) -> tuple[float, float]:
    """Returns the probability of the answer as the authors of VQAScore compute it, and that of BLIP's benchmark.

    For FLAN-T5 it is exp of minus the mean cross-entropy of the answer and its end; T2I-CompBench takes
    p(yes) / (p(yes) + p(no)) of the first token after [DEC], to a question that begins with [ENC].
    """
    tokenizer, question = processor.tokenizer, QUESTION.format(prompt)
    if name == "qwen":
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
    else:
        inputs = processor(images=image, text="<image>\n" * (name == "llava") + question, return_tensors="pt")
    if name == "instruct_blip":
        labels = tokenizer("Yes", return_tensors="pt").input_ids
        assert labels.tolist() == [[tokenizer.convert_tokens_to_ids("Yes"), tokenizer.eos_token_id]]
        return math.exp(-float(model(**inputs, labels=labels).loss)), 0.0
    if name == "blip":
        inputs["input_ids"][:, 0] = model.config.text_config.bos_token_id + 1
        options = {"max_new_tokens": 1, "output_scores": True, "return_dict_in_generate": True}
        probabilities = model.generate(**inputs, **options).scores[0][0].softmax(-1)
        yes, no = (float(probabilities[tokenizer.convert_tokens_to_ids(word)]) for word in ("yes", "no"))
        return yes, yes / (yes + no)
    probabilities = model(**inputs).logits[0, -1].softmax(-1)
    return float(probabilities[tokenizer.convert_tokens_to_ids("Yes")]), 0.0


@pytest.mark.parametrize("name", ["llava", "qwen", "instruct_blip", "blip"])
def test_vqa_score_is_the_probability_of_the_answer(folder, name):
    images, prompts = pictures(4, 40, 56), ["a", "a longer prompt", "panda", "{prompt}"]
    auto = BlipForQuestionAnswering if name == "blip" else AutoModelForImageTextToText
    model, processor = auto.from_pretrained(folder(name)).eval(), AutoProcessor.from_pretrained(folder(name))
    pairs = zip(as_pil(images), prompts, strict=True)
    expected = torch.tensor([plain_vqa_score(name, model, processor, *pair) for pair in pairs])
    reward = VQAScore(folder(name), answer="yes" if name == "blip" else "Yes", batch_size=3, dtype="float32")
    scores = reward.score(images, prompts)
    torch.testing.assert_close(scores, expected[:, 0], rtol=1e-4, atol=1e-7)
    assert scores.max() > 1.5 * scores.min()
    answers = reward.ask(images, reward.questions(prompts), reward.answer)
    torch.testing.assert_close(answers.exact.exp() + answers.other.exp(), torch.ones(4))
    reward.logit = True
    logits = torch.logit(expected[:, 0].double()).float()
    torch.testing.assert_close(reward.score(images, prompts), logits, rtol=1e-4, atol=1e-3)
    judge = VLMJudge(folder(name))
    torch.testing.assert_close(judge.log_odds(images, reward.questions(prompts)), answers.yes - answers.no)
    if name == "blip":  # its only spellings are yes and no
        torch.testing.assert_close(torch.sigmoid(answers.yes - answers.no), expected[:, 1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("said", "p", "logit"),
    [
        (logprobs(Yes=-0.5, yes=-2.0, No=-1.5), math.exp(-0.5), math.log(math.exp(-0.5) / (1 - math.exp(-0.5)))),
        (logprobs(No=-0.001, Yes=-8.0), math.exp(-8), math.log(math.exp(-8) / (1 - math.exp(-8)))),
        (logprobs(No=-0.001, maybe=-9.0), math.exp(-9), math.log(math.exp(-9) / (1 - math.exp(-9)))),  # a bound
        (logprobs(Yes=0.0, No=-30.0), 1.0, 30.0),
        (logprobs(Yes=-0.5), math.exp(-0.5), math.log(math.exp(-0.5) / (1 - math.exp(-0.5)))),  # one token alone
        (logprobs(No=-0.001), -math.expm1(-0.001), math.log(-math.expm1(-0.001)) + 0.001),  # a bound
    ],
)
def test_vqa_score_by_an_endpoint(said, p, logit):
    with chat_server(lambda body, handler: said) as (address, asked):
        for score, wanted in ((VQAScore, p), (lambda **options: VQAScore(logit=True, **options), logit)):
            reward = score(endpoint=address, model="tiny", question='"{prompt}"?', retries=0)
            assert reward.score(pictures(1), PROMPTS[:1]).tolist() == pytest.approx([wanted], rel=1e-4)
    assert seen_and_asked(asked[0]["body"])[1] == f'"{PROMPTS[0]}"?'


def test_the_judge_reads_the_most_likely_token_alone():
    """Some endpoints give no others; then all others together are a bound of the other answer."""
    with chat_server(lambda body, handler: logprobs(yes=-0.25)) as (address, _):
        score = VLMJudge(endpoint=address, model="tiny", retries=0).score(pictures(1), PROMPTS[:1])
    assert score.tolist() == pytest.approx([-0.25 - math.log(1 - math.exp(-0.25))], rel=1e-4)


def test_an_answer_of_several_tokens_is_refused(folder):
    with pytest.raises(UserError, match=r"VQAScore: answer='certainly' is 9 tokens of .*; expected a single token"):
        VQAScore(folder("llava"), answer="certainly", dtype="float32").load()
    for name in ("blip", "instruct_blip"):
        with pytest.raises(UserError, match="answer is empty"):
            VQAScore(folder(name), answer="", dtype="float32").load()


# ---- HPSv3


@torch.no_grad()
def plain_hps_v3(folder: str, images: torch.Tensor, prompts: list[str], area: int) -> torch.Tensor:
    """Returns HPSv3 with the authors' steps: PIL resizing, the processor, whole texts, padding, positions 0, 1, 2, ...

    Their forward gives embeddings to the language model without positions, which then counts tokens.
    """
    processor = AutoProcessor.from_pretrained(f"{folder}/base")
    processor.tokenizer.add_special_tokens({"additional_special_tokens": [HPS_V3_TOKEN]})
    state = load_file(f"{folder}/HPSv3.safetensors")
    config = AutoConfig.from_pretrained(f"{folder}/base")
    config.text_config.vocab_size = len(processor.tokenizer)
    model = Qwen2VLForConditionalGeneration(config).eval()
    names = {}
    for name, tensor in state.items():
        inside = name.startswith("model.")
        new = "model." + name if name.startswith("visual.") else name.replace("model.", "model.language_model.", inside)
        names[new] = tensor
    head = {name: names.pop(name) for name in list(names) if name.startswith("rm_head.")}
    model.load_state_dict(names)

    resized = []
    for image in as_pil(images):
        height, width = smart_resize(image.height, image.width, 16, area, area)
        resized.append(image.resize((width, height), resample=3))
    content = [[{"type": "image"}, {"type": "text", "text": INSTRUCTION.format(prompt=prompt)}] for prompt in prompts]
    turns = [[{"role": "user", "content": each}] for each in content]
    texts = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    processor.tokenizer.padding_side = "right"
    inputs = processor(text=texts, images=resized, padding=True, return_tensors="pt")
    ids = inputs["input_ids"]
    embeddings = model.model.language_model.embed_tokens(ids)
    seen = model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
    embeddings = embeddings.masked_scatter((ids == config.image_token_id)[..., None], seen)
    states = model.model.language_model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"])[0]
    read = states[ids == processor.tokenizer.convert_tokens_to_ids(HPS_V3_TOKEN)]
    assert len(read) == len(prompts)
    for place in (0, 3, 5):
        read = torch.nn.functional.linear(read, head[f"rm_head.{place}.weight"], head[f"rm_head.{place}.bias"])
        read = read.relu() if place < 5 else read
    return read[:, 0]


def hps_v3(folder, name: str = "HPSv3.safetensors", **options) -> HPSv3:
    home = folder("hps_v3")
    return HPSv3(f"{home}/{name}", base=f"{home}/base", **{"dtype": "float32", "pixels": 64 * 64, **options})


def test_hps_v3_is_that_of_the_authors(folder):
    """Without resizing it is equal; resizing rounds to 8 bits with PIL, and does not here."""
    prompts = ["a", "a much longer prompt, of many words", "panda", "<|im_end|> {}"]
    images = pictures(4, 64, 64)
    expected = plain_hps_v3(folder("hps_v3"), images, prompts, 64 * 64)
    reward = hps_v3(folder, batch_size=3)
    torch.testing.assert_close(reward.score(images, prompts), expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.05
    images = pictures(2, 40, 56) * 0.5 + 0.25
    images, area = (images * 255).round() / 255, 160 * 160
    expected = plain_hps_v3(folder("hps_v3"), images, prompts[:2], area)
    torch.testing.assert_close(hps_v3(folder, pixels=area).score(images, prompts[:2]), expected, rtol=0.01, atol=0.02)


@pytest.mark.parametrize("size", [(512, 512), (40, 56), (1024, 768), (300, 90), (448, 448)])
def test_sizes_are_those_of_the_authors(size):
    for factor, area in ((28, 256 * 28 * 28), (16, 64 * 64)):
        assert smart_size(*size, factor, area) == smart_resize(*size, factor, area, area)
    assert smart_size(512, 512, 28, 256 * 28 * 28) == (448, 448)


def test_patches_are_those_of_the_processor(folder):
    processor = AutoProcessor.from_pretrained(f"{folder('hps_v3')}/base").image_processor
    images = pictures(2, 48, 64)
    expected = processor(images=as_pil(images), return_tensors="pt", size={"shortest_edge": 16, "longest_edge": 10**6})
    mean, std = (torch.tensor(list(values))[:, None, None] for values in (processor.image_mean, processor.image_std))
    torch.testing.assert_close(patches((images - mean) / std, processor), expected.pixel_values, rtol=0, atol=1e-5)


def test_the_instruction_is_the_authors():
    text = INSTRUCTION.replace("{prompt}", "{text_prompt}").encode()
    assert hashlib.sha256(text).hexdigest() == "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"


def test_names_of_todays_transformers_are_read_too(folder):
    home = Path(folder("hps_v3"))
    state = load_file(home / "HPSv3.safetensors")
    renamed = {}
    for name, tensor in state.items():
        first, _, rest = name.partition(".")
        renamed[{"visual": f"model.{name}", "model": f"model.language_model.{rest}"}.get(first, name)] = tensor
    save_file(renamed, home / "new.safetensors")
    images = pictures(1)
    assert torch.equal(
        hps_v3(folder, "new.safetensors").score(images, PROMPTS[:1]), hps_v3(folder).score(images, PROMPTS[:1])
    )


def test_in_half_precision_the_head_keeps_its_digits(folder):
    images = pictures(4)
    half, exact = hps_v3(folder, dtype="bfloat16"), hps_v3(folder)
    scores = half.score(images, PROMPTS)
    assert {tensor.dtype for tensor in half.network.backbone.parameters()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in half.network.head.parameters()} == {torch.float32}
    assert not torch.equal(scores, scores.bfloat16().float())
    torch.testing.assert_close(scores, exact.score(images, PROMPTS), rtol=0.2, atol=0.2)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda state: state.pop("model.norm.weight"),
            "lacks 1 weights of Qwen2-VL, first model.language_model.no",
        ),
        (lambda state: state.pop("rm_head.3.bias"), "another architecture: 1 names differ, first 3.bias"),
        (lambda state: [state.pop(name) for name in list(state) if name.startswith("rm")], "no reward head"),
        (lambda state: state.update({"visual.more": torch.ones(1)}), "holds 1 weights that Qwen2-VL does not use"),
        (
            lambda state: state.update({"model.norm.weight": torch.ones(8)}),
            r"of other shapes .* \[8\] instead of \[32\]",
        ),
        (
            lambda state: state.update({"model.embed_tokens.weight": state["model.embed_tokens.weight"][:-1]}),
            r"words, but the tokenizer of .* has \d+ with <|Reward|>",
        ),
    ],
)
def test_other_weights_are_refused(folder, edit, message):
    home = Path(folder("hps_v3"))
    state = load_file(home / "HPSv3.safetensors")
    edit(state)
    save_file(state, home / "other.safetensors")
    with pytest.raises(UserError, match=message):
        hps_v3(folder, "other.safetensors").load()


def test_another_base_is_refused(folder):
    weights = folder("hps_v3") + "/HPSv3.safetensors"
    with pytest.raises(UserError, match=r"base='.*' is a llava model; expected a Qwen2-VL"):
        HPSv3(weights, base=folder("llava")).load()
    with pytest.raises(UserError, match="base='/nowhere' is not a folder"):
        HPSv3(weights, base="/nowhere").load()
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        HPSv3(batch_size=0)
    with pytest.raises(UserError, match="an image is 8 x 1700 pixels; expected sides that differ by a factor of 200"):
        hps_v3(folder).score(torch.rand(1, 3, 1700, 8), PROMPTS[:1])


def test_both_guide_and_score_from_the_command_line(folder, tmp_path, capsys):
    """The recorded rewards are those of the saved pictures; a run continues only with the same weights."""
    home, run = folder("hps_v3"), tmp_path / "run"
    weights = shutil.copy(f"{home}/HPSv3.safetensors", tmp_path / "HPSv3.safetensors")
    options = {"pretrained": str(weights), "base": f"{home}/base", "pixels": 64 * 64, "dtype": "float32"}
    words = ["predict", "--model.diffusion", "tests.faults.stub.StubDiffusion", "--trainer.accelerator", "cpu"]
    words += ["--data.prompts", '["apple", "owl"]', "--model.sampler.num_candidates", "3", "--output", str(run)]
    words += ["--model.reward", "VQAScore", "--model.reward.pretrained", folder("blip"), "--model.reward.answer", "yes"]
    words += ["--model.reward.dtype", "float32", "--model.eval_rewards+", "HPSv3"]
    words += [word for name, value in options.items() for word in (f"--model.eval_rewards.{name}", str(value))]
    assert main(words) == 0
    scores = [word for name, value in options.items() for word in (f"--reward.{name}", str(value))]
    assert main(["score", "--reward", "HPSv3", *scores, "--images", str(run)]) == 0
    rows = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    rewards = {"VQAScore": VQAScore(folder("blip"), answer="yes", dtype="float32"), "HPSv3": HPSv3(**options)}
    for row in rows:
        with Image.open(run / row["file"]) as picture:
            pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
        found = {name: float(reward.score(pixels, [row["prompt"]])) for name, reward in rewards.items()}
        assert row["rewards"] == pytest.approx(found, rel=0.02)
    mean = sum(row["rewards"]["HPSv3"] for row in rows) / 2
    said = capsys.readouterr().out.split("HPSv3: mean ")
    assert [float(text.split()[0].rstrip(",")) for text in said[1:]] == pytest.approx([mean, mean], rel=0.02)
    state = load_file(weights)
    save_file({name: tensor * 1.01 for name, tensor in state.items()}, weights)
    assert main([*words, "--data.prompts", '["apple", "owl", "car"]']) == 2
    assert "other contents of reward HPSv3" in capsys.readouterr().err
