"""benchmarks/hardware.py: counts, a user's loops against our chain, and the page."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from transformers import T5Config, T5EncoderModel

from benchmarks import hardware_bench
from benchmarks.clock import Clock
from benchmarks.hardware import main
from benchmarks.hardware_bench import Bench
from benchmarks.hardware_page import write
from benchmarks.plain_loops import PlainLoops
from benchmarks.shapes import SHAPES, Shape, random
from svdd.rewards.jpeg import Compressibility
from tests.tiny_families import FAMILIES

TINY = [each for each in FAMILIES if each.name in ("SDXL", "SD 3.5", "FLUX.1 dev")]


def test_the_embedded_model(tmp_path, capsys, monkeypatch):
    small = [(name, (sizes[0] // 4, 1), kind) for name, sizes, kind in hardware_bench.JOBS]
    monkeypatch.setattr(hardware_bench, "JOBS", small)
    page = tmp_path / "hardware.md"
    options = ["--shape", "emoji", "--device", "cpu", "--steps", "2", "--rows", "1", "--no_compile"]
    section = main([*options, "--minutes", "60", "--output", str(page)])
    assert section["left_out"] == ["compile: not wanted"]
    assert section["steps"] == 2
    rows, runs = section["rows"], section["runs"]
    assert {(each["part"], each["rows"], each["mode"]) for each in rows} == {
        (part, n, mode) for part in ("network", "decoder") for n in (1,) for mode in ("parity", "default")
    }
    assert [(each["sampler"], each["size"]) for each in runs] == [
        *(("SVDD", 2), ("BestOfN", 2), ("SVDD", 5), ("SMC", 2), ("SVDD", 2))
    ]
    for run in runs:
        m, guided = run["size"], run["sampler"] == "SVDD"
        assert run["network_rows"] == 2 * (1 + m if guided else 2 * m)
        assert run["decoded_images"] == (m if run["sampler"] == "BestOfN" else 2 * m)
        assert sum(run["shares"].values()) == pytest.approx(1)
        assert all(part >= 0 for part in run["shares"].values())
        if run["reward"] == Compressibility().name and run["sampler"] != "SMC":
            for label in ("one by one", "at once"):
                assert run[label]["network_rows"] == run["network_rows"]
                assert run[label]["decoded_images"] == run["decoded_images"]
    text = page.read_text()
    assert f"{runs[0]['one by one']['seconds'] / runs[0]['seconds']:.2f}" in text
    other = {**section, "device": "another card", "runs": []}
    write(page, other)
    main([*options, "--minutes", "0.001", "--output", str(page)])  # replaces its own section and keeps the other
    lines = [json.loads(line) for line in (tmp_path / "data" / "hardware.jsonl").read_text().splitlines()]
    assert [bool(each["runs"]) for each in lines] == [False, False]
    assert other in lines
    assert page.read_text().count("\n## ") == 2
    assert "SVDD, 2, Compressibility: about" in page.read_text()
    for wrong in ("--device tpu", "--steps 1", "--minutes 0"):
        with pytest.raises(SystemExit):
            main(wrong.split())
        assert f"{wrong.split()[0]} " in capsys.readouterr().err


@pytest.mark.parametrize("family", TINY, ids=lambda family: family.name)
def test_the_loops_of_a_user_compute_what_the_chain_computes(family, tmp_path: Path):
    folder = family.save(tmp_path)
    pipe = getattr(diffusers, json.loads((tmp_path / "model_index.json").read_text())["_class_name"])
    pipe = pipe.from_pretrained(folder)
    shape = Shape("tiny", 64, type(pipe).__name__, dict, {"vae": dict}, {})
    bench = Bench(pipe, shape, torch.device("cpu"), Clock(60), 1)
    bench.cost = {part + alone: 0.0 for part in ("network", "decoder") for alone in ("", " alone")}
    model = bench.model("SVDD", 3, Compressibility, 2)
    run = bench.run(model, "SVDD", 3)
    bench.compare(run, model, "SVDD", 3, 2)
    for label in ("one by one", "at once"):
        assert run[label]["network_rows"] == run["network_rows"]
        assert run[label]["decoded_images"] == run["decoded_images"]
    chain = model.diffusion
    loops = PlainLoops(pipe, 2, chain.guidance_scale, 64)
    x, row = torch.randn(2, *chain.latent_shape), torch.zeros(2, dtype=torch.int64)
    with torch.no_grad():
        loops._begin("a red apple")
        texts = chain.encode(["a red apple"], [None])
        packed = pipe._pack_latents(x, *x.shape) if loops.flux else x
        for i in range(2):
            expected = chain.denoise(x, i, texts, row).x0
            found = loops._clean(packed, loops._evaluate(packed, i), i)
            assert torch.allclose(loops._decode(found), chain.decode(expected), atol=1e-4)


def test_published_shapes_have_their_published_sizes():
    """Parameters in millions, as the model cards or the papers state them."""
    stated = {"sd15": 860, "sdxl": 2567, "sd35": 8057, "flux": 11901}
    for name, millions in stated.items():
        parts = SHAPES[name].parts
        with torch.device("meta"):
            network = next(iter(parts.values()))()
        assert round(sum(weight.numel() for weight in network.parameters()) / 1e6) == millions
    config = T5Config(vocab_size=98, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    encoder = random(lambda: T5EncoderModel(config), "cpu", torch.float16)
    tensors = dict(encoder.named_parameters()) | dict(encoder.named_buffers())
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    expected = {name: torch.float32 if ".wo." in name else torch.float16 for name, _ in encoder.named_parameters()}
    assert {name: tensors[name].dtype for name in expected} == expected
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight  # tied weights stay one
