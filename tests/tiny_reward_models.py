"""Small random reward models of the published architectures, and independent computations of their scores."""

import base64
import io
import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    BertTokenizer,
    BitImageProcessor,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    ConvNextImageProcessor,
    Dinov2Config,
    Dinov2Model,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

# ---- ImageReward, in the layout of BLIP's authors

BLIP_TOKENS = 35
BLIP_SIDE, BLIP_PATCH, BLIP_VISION, BLIP_TEXT, BLIP_DEPTH, HEAD = 32, 16, 192, 128, 2, 64


def _linear(state: dict, name: str, rows: int, columns: int, gain: float = 1.0) -> None:
    state[f"{name}.weight"] = torch.randn(rows, columns) * gain / math.sqrt(columns)
    state[f"{name}.bias"] = torch.randn(rows) * 0.1


def _norm(state: dict, name: str, width: int) -> None:
    state[f"{name}.weight"] = 1 + 0.1 * torch.randn(width)
    state[f"{name}.bias"] = 0.1 * torch.randn(width)


def image_reward_weights(words: int) -> dict[str, Tensor]:
    """Returns random weights under the published names, unused ones included."""
    torch.manual_seed(3)
    state: dict[str, Tensor] = {}
    vision, text, wide = "blip.visual_encoder", "blip.text_encoder", BLIP_VISION
    state[f"{vision}.cls_token"] = torch.randn(1, 1, wide)
    state[f"{vision}.pos_embed"] = torch.randn(1, 1 + (BLIP_SIDE // BLIP_PATCH) ** 2, wide) * 0.2
    _linear(state, f"{vision}.patch_embed.proj", wide, 3 * BLIP_PATCH**2, gain=2)
    state[f"{vision}.patch_embed.proj.weight"] = state[f"{vision}.patch_embed.proj.weight"].view(wide, 3, 16, 16)
    for k in range(BLIP_DEPTH):
        block = f"{vision}.blocks.{k}"
        for norm in ("norm1", "norm2"):
            _norm(state, f"{block}.{norm}", wide)
        _linear(state, f"{block}.attn.qkv", 3 * wide, wide)
        _linear(state, f"{block}.attn.proj", wide, wide)
        _linear(state, f"{block}.mlp.fc1", 2 * wide, wide)
        _linear(state, f"{block}.mlp.fc2", wide, 2 * wide)
    _norm(state, f"{vision}.norm", wide)
    state[f"{text}.embeddings.position_ids"] = torch.arange(64)[None]
    state[f"{text}.embeddings.word_embeddings.weight"] = torch.randn(words, BLIP_TEXT)
    state[f"{text}.embeddings.position_embeddings.weight"] = torch.randn(64, BLIP_TEXT) * 0.3
    _norm(state, f"{text}.embeddings.LayerNorm", BLIP_TEXT)
    for k in range(BLIP_DEPTH):
        layer = f"{text}.encoder.layer.{k}"
        for attention, width in (("attention", BLIP_TEXT), ("crossattention", wide)):
            _linear(state, f"{layer}.{attention}.self.query", BLIP_TEXT, BLIP_TEXT, gain=2)
            _linear(state, f"{layer}.{attention}.self.key", BLIP_TEXT, width)
            _linear(state, f"{layer}.{attention}.self.value", BLIP_TEXT, width)
            _linear(state, f"{layer}.{attention}.output.dense", BLIP_TEXT, BLIP_TEXT)
            _norm(state, f"{layer}.{attention}.output.LayerNorm", BLIP_TEXT)
        _linear(state, f"{layer}.intermediate.dense", 2 * BLIP_TEXT, BLIP_TEXT)
        _linear(state, f"{layer}.output.dense", BLIP_TEXT, 2 * BLIP_TEXT)
        _norm(state, f"{layer}.output.LayerNorm", BLIP_TEXT)
    _linear(state, "blip.vision_proj", 8, wide)  # of BLIP's pretraining
    _linear(state, "blip.text_proj", 8, BLIP_TEXT)
    widths = [BLIP_TEXT, 1024, 128, 64, 16, 1]
    for place, width, narrower in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        _linear(state, f"mlp.layers.{place}", narrower, width)
    return state


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention with heads of 64, [n, tokens, width]; mask is 1 for visible keys, [n, keys]."""
    query, key, value = (part.unflatten(-1, (-1, HEAD)).transpose(1, 2) for part in (query, key, value))
    logits = query @ key.transpose(-1, -2) / HEAD**0.5
    if mask is not None:
        logits = logits + (1 - mask[:, None, None].to(logits)) * -10000.0
    return (logits.softmax(-1) @ value).transpose(1, 2).flatten(2)


def plain_image_reward(state: dict[str, Tensor], pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Returns ImageReward of normalised pixels and tokens, implemented from the paper's and BLIP's description."""

    def linear(name: str, inputs: Tensor) -> Tensor:
        return F.linear(inputs, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name: str, inputs: Tensor, epsilon: float) -> Tensor:
        return F.layer_norm(inputs, inputs.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], epsilon)

    vision, text = "blip.visual_encoder", "blip.text_encoder"
    patches = F.conv2d(
        pixels, state[f"{vision}.patch_embed.proj.weight"], state[f"{vision}.patch_embed.proj.bias"], BLIP_PATCH
    )
    seen = torch.cat([state[f"{vision}.cls_token"].expand(len(pixels), -1, -1), patches.flatten(2).transpose(1, 2)], 1)
    seen = seen + state[f"{vision}.pos_embed"]
    for k in range(BLIP_DEPTH):
        block = f"{vision}.blocks.{k}"
        query, key, value = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", seen, 1e-6)).chunk(3, -1)
        seen = seen + linear(f"{block}.attn.proj", _attend(query, key, value))
        hidden = F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", seen, 1e-6)))
        seen = seen + linear(f"{block}.mlp.fc2", hidden)
    seen = norm(f"{vision}.norm", seen, 1e-6)

    embeddings = f"{text}.embeddings"
    read = state[f"{embeddings}.word_embeddings.weight"][ids]
    read = read + state[f"{embeddings}.position_embeddings.weight"][: ids.shape[1]]
    read = norm(f"{embeddings}.LayerNorm", read, 1e-12)
    for k in range(BLIP_DEPTH):
        layer = f"{text}.encoder.layer.{k}"
        for attention in ("attention", "crossattention"):
            part, crossed = f"{layer}.{attention}", attention == "crossattention"
            source = seen if crossed else read
            query, key, value = (
                linear(f"{part}.self.{name}", read if name == "query" else source) for name in ("query", "key", "value")
            )
            context = _attend(query, key, value, None if crossed else mask)
            read = norm(f"{part}.output.LayerNorm", linear(f"{part}.output.dense", context) + read, 1e-12)
        hidden = F.gelu(linear(f"{layer}.intermediate.dense", read))
        read = norm(f"{layer}.output.LayerNorm", linear(f"{layer}.output.dense", hidden) + read, 1e-12)
    features = read[:, 0]
    for place in (0, 2, 4, 6, 7):
        features = linear(f"mlp.layers.{place}", features)
    return (features[:, 0] - 0.16717362830052426) / 1.0333394966054072


def bert_tokenizer() -> BertTokenizer:
    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    return BertTokenizer(vocab={word: k for k, word in enumerate(words)})


def save_tiny_image_reward(folder: Path) -> str:
    """Saves `ImageReward.pt` and a tokenizer."""
    tokenizer = bert_tokenizer()
    torch.save(image_reward_weights(len(tokenizer) + 2), folder / "ImageReward.pt")
    tokenizer.save_pretrained(folder)
    return str(folder)


# ---- classifiers

LABELS = {0: "tabby, tabby cat", 1: "crane", 2: "Egyptian cat", 3: "crane", 4: "red apple"}


def save_tiny_vit(folder: Path, **options) -> str:
    """Saves a 32 px ViT with its processor: bilinear resizing of both sides, pixels in -1 .. 1."""
    torch.manual_seed(4)
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        id2label=LABELS,
        initializer_range=0.1,
        **options,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def save_tiny_resnet(folder: Path) -> str:
    """Saves a ResNet with the published processor: ConvNeXT's, with bicubic resizing and a crop."""
    torch.manual_seed(5)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", id2label=LABELS, num_channels=3
    )
    model = ResNetForImageClassification(config)
    with torch.no_grad():
        model.classifier[1].weight.normal_()
    model.save_pretrained(folder)
    ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.8).save_pretrained(folder)
    return str(folder)


# ---- vision-language models

QWEN_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "start": "<|vision_start|>",
    "end": "<|vision_end|>",
}
CHAT = (
    "{% for message in messages %}{{ '<s>' + message['role'] + ': ' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' answer:' }}{% endif %}"
)


def byte_tokenizer(*special: str, words: tuple[str, ...] = ("yes", "Yes", "no", "No")) -> PreTrainedTokenizerFast:
    """Returns a byte tokenizer with single tokens for some words, with and without a leading space."""
    vocabulary = {letter: k for k, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [(word[:k], word[k]) for word in words for k in range(1, len(word))]
    merges += [("\u0120", word) for word in words]  # leading space
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>", "<pad>", *special)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


def save_tiny_llava(folder: Path, **options) -> str:
    """Saves a 32 px LLaVA whose processor has no chat template, as in the first release of LLaVA-1.5."""
    torch.manual_seed(6)
    tokenizer = byte_tokenizer("<image>", **options)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        initializer_range=0.3,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>")
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    pixels = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    LlavaProcessor(
        pixels, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    ).save_pretrained(folder)
    return str(folder)


def tiny_qwen_config(
    words: int, index: dict[str, int], start: int = 0, end: int = 0, spread: float = 0.3
) -> Qwen2VLConfig:
    """Returns the configuration of a Qwen2-VL with two layers of each kind."""
    return Qwen2VLConfig(
        vision_config={
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": 32,
            "num_heads": 2,
            "patch_size": 8,
            "initializer_range": spread,
        },
        text_config={
            "vocab_size": words,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "initializer_range": spread,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            "bos_token_id": start,
            "eos_token_id": end,
        },
        image_token_id=index["image_token"],
        video_token_id=index["video_token"],
        vision_start_token_id=index["start"],
        vision_end_token_id=index["end"],
    )


def save_tiny_qwen(folder: Path) -> str:
    """Saves a Qwen2-VL, which accepts any image shape, with a chat template that writes `<s>`."""
    torch.manual_seed(7)
    tokenizer = byte_tokenizer(*QWEN_TOKENS.values())
    index = {name: tokenizer.convert_tokens_to_ids(token) for name, token in QWEN_TOKENS.items()}
    config = tiny_qwen_config(len(tokenizer), index, tokenizer.bos_token_id, tokenizer.eos_token_id)
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    sizes = {"patch_size": 8, "min_pixels": 16 * 16, "max_pixels": 64 * 64}
    pixels, videos = Qwen2VLImageProcessor(**sizes), Qwen2VLVideoProcessor(**sizes)
    Qwen2VLProcessor(pixels, tokenizer, videos, chat_template=CHAT).save_pretrained(folder)
    return str(folder)


QWEN_CHAT = (  # the form of Qwen2-VL's
    "{% for message in messages %}{% if loop.first %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HPS_V3_TOKEN = "<|Reward|>"


def save_tiny_hps_v3(folder: Path) -> str:
    """Saves HPSv3.safetensors under the authors' names, and the folder `base`: its Qwen2-VL's configuration, processor.

    The tokenizer, of Qwen's class, has words of the instruction, so that texts are as short as Qwen's.
    """
    from svdd.rewards.hps_v3 import INSTRUCTION

    torch.manual_seed(8)
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator([INSTRUCTION], trainer)
    rules = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in rules["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=rules["vocab"], merges=merges)
    tokenizer.add_tokens(
        [AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>", *QWEN_TOKENS.values())],
        special_tokens=True,
    )
    index = {name: tokenizer.convert_tokens_to_ids(token) for name, token in QWEN_TOKENS.items()}
    config = tiny_qwen_config(len(tokenizer) + 5, index, spread=0.2)  # some rows are spare, as in Qwen2-VL
    config.save_pretrained(folder / "base")
    pixels, videos = Qwen2VLImageProcessor(patch_size=8), Qwen2VLVideoProcessor(patch_size=8)
    Qwen2VLProcessor(pixels, tokenizer, videos, chat_template=QWEN_CHAT).save_pretrained(folder / "base")

    model = Qwen2VLForConditionalGeneration(config)
    model.resize_token_embeddings(len(tokenizer) + 1)  # for <|Reward|>
    state = {}
    for name, tensor in model.state_dict().items():  # in transformers 4.45, with which the authors saved theirs
        old = name.removeprefix("model.") if name.startswith("model.visual.") else name.replace(".language_model.", ".")
        state[old] = tensor.clone()
    for place, rows, columns in ((0, 1024, 32), (3, 16, 1024), (5, 2, 16)):
        _linear(state, f"rm_head.{place}", rows, columns, gain=2)
    save_file(state, folder / "HPSv3.safetensors")
    return str(folder)


# ---- BLIP: models whose decoder writes the answer


def save_tiny_blip(folder: Path) -> str:
    """Saves a BLIP for visual question answering, whose words are BERT's, [DEC] and [ENC]."""
    torch.manual_seed(9)
    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "yes",
        "no",
        *letters,
        *(f"##{letter}" for letter in letters),
    ]
    tokenizer = BertTokenizer(vocab={word: k for k, word in enumerate(words)})
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(words) + 2, "bos_token_id": len(words), "sep_token_id": 3, "pad_token_id": 0}
    text |= {"encoder_hidden_size": 32, "max_position_embeddings": 128, "initializer_range": 0.3, "is_decoder": True}
    vision = {"image_size": 32, "patch_size": 8, "initializer_range": 0.3}
    config = BlipConfig(text_config=sizes | text, vision_config=sizes | vision)
    BlipForQuestionAnswering(config).save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return str(folder)


def save_tiny_instruct_blip(folder: Path) -> str:
    """Saves an InstructBLIP with a T5, whose tokenizer ends each text."""
    torch.manual_seed(10)
    tokenizer = byte_tokenizer("<image>")
    ended = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.convert_tokens_to_ids("</s>"))]
    )
    tokenizer.backend_tokenizer.post_processor = ended
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    asked = bert_tokenizer()
    config = InstructBlipConfig(
        vision_config=sizes | {"image_size": 32, "patch_size": 8, "initializer_range": 0.3},
        qformer_config=sizes | {"vocab_size": len(asked), "initializer_range": 0.3},
        text_config=T5Config(
            vocab_size=len(tokenizer),
            d_model=32,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=2,
            initializer_factor=1.5,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
        ).to_dict(),
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = InstructBlipForConditionalGeneration(config)
    model.query_tokens.data.normal_()
    model.save_pretrained(folder)
    pixels = BlipImageProcessor(size={"height": 32, "width": 32})
    InstructBlipProcessor(pixels, tokenizer, asked, num_query_tokens=4).save_pretrained(folder)
    return str(folder)


# ---- an endpoint with OpenAI's chat API


def logprobs(**tokens: float) -> dict:
    """Returns an answer with these log-probabilities; the first token is the text."""
    top = [{"token": token, "logprob": value, "bytes": None} for token, value in tokens.items()]
    content = [{**top[0], "top_logprobs": top}]
    return {"choices": [{"message": {"content": top[0]["token"]}, "logprobs": {"content": content}}]}


def seen_and_asked(body: dict) -> tuple[np.ndarray, str]:
    """Returns the image and the question of a request."""
    image, text = body["messages"][0]["content"]
    kind, _, data = image["image_url"]["url"].partition(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), text["text"]


def judge(body: dict) -> dict:
    """Answers a request: the probability of yes grows with brightness and the length of the question."""
    picture, question = seen_and_asked(body)
    yes = picture.mean() / 255 - 3 + len(question) / 100
    return logprobs(yes=yes, No=-1.0, maybe=-9.0)


def rubric_shares(picture: np.ndarray, question: str) -> dict[int, float]:
    """Returns the probabilities of the marks from 1 to 9: the mean grows with brightness and the question's length."""
    centre = 1 + 4 * picture.mean() / 255 + len(question) / 100
    shares = {mark: float(np.exp(-((mark - centre) ** 2))) for mark in range(1, 10)}
    return {mark: 0.9 * share / sum(shares.values()) for mark, share in shares.items()}


def rubric_mark(picture: np.ndarray, question: str) -> float:
    """Returns the expected mark, on the scale that the question ends with."""
    highest = int(question.partition(" to ")[2][0])
    shares = {mark: share for mark, share in rubric_shares(picture, question).items() if mark <= highest}
    return sum(mark * share for mark, share in shares.items()) / sum(shares.values())


def rubric_server(body: dict, handler: Any = None) -> dict:
    """Answers with the probabilities of the marks, and another word with a tenth."""
    tokens = {str(mark): np.log(share) for mark, share in rubric_shares(*seen_and_asked(body)).items()}
    return logprobs(**dict(sorted({**tokens, "The": np.log(0.1)}.items(), key=lambda pair: -pair[1])))


def marks(body: dict, handler: Any = None) -> dict:
    """Answers with the lines of UnifiedReward: the marks grow with brightness and the length of the question."""
    picture, question = seen_and_asked(body)
    mark = 1 + 2 * picture.mean() / 255 + len(question) / 1000
    text = "".join(f"{aspect} Score (1-5): {mark:.4f}\n" for aspect in ("Alignment", "Coherence", "Style"))
    return {"choices": [{"message": {"content": text}}]}


@contextmanager
def chat_server(answer: Callable[[dict, Any], Any]) -> Iterator[tuple[str, list[dict]]]:
    """Serves `answer(body, handler)` on this machine; yields the address up to /v1 and the list of requests.

    An answer is an object, sent as JSON; bytes, sent unchanged; (status, object or bytes, headers); or None if `answer`
    has replied through the handler.
    """
    asked: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append({"path": self.path, "headers": dict(self.headers), "body": body})
            said = answer(body, self)
            if said is None:
                return
            status, said, headers = said if isinstance(said, tuple) else (200, said, {})
            said = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(said))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# ---- a server with the protocol of HTTPReward


def images_of_request(body: dict) -> np.ndarray:
    """Returns the images of a request, uint8 [n, h, w, 3]."""
    files = [Image.open(io.BytesIO(base64.b64decode(image))) for image in body["images"]]
    assert {file.format for file in files} == {body["format"].upper()}
    return np.stack([np.asarray(file) for file in files])


def brightness(body: dict, handler=None) -> dict:
    """Answers with the brightness of each image plus the length of its prompt."""
    lengths = [len(prompt) for prompt in body["prompts"]]
    return {"scores": (images_of_request(body).mean((1, 2, 3)) / 255 + lengths).tolist()}


# ---- Similarity


def save_tiny_dinov2(folder: Path) -> str:
    """Saves a random DINOv2 with its processor."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return str(folder)


def save_alexnet(folder: Path) -> str:
    """Saves random weights of AlexNet's convolutions, as torchvision names them."""
    torch.manual_seed(0)
    state = torchvision.models.alexnet().features.state_dict()
    torch.save({f"features.{name}": tensor for name, tensor in state.items()}, folder / "alexnet.pth")
    return str(folder / "alexnet.pth")
