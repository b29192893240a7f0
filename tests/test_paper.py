"""The configurations of the paper's experiments: every method and both rewards, with tiny models."""

from pathlib import Path

import pytest
import yaml

from svdd.__main__ import main

CONFIGS = Path(__file__).parent.parent / "configs" / "paper"
T, COUNT = 3, 20  # steps here; M and N of the configurations
ROWS = {
    None: 1 + COUNT * (T - 1),  # SVDD-PM, which the configuration of a reward selects
    "svdd_mc": T,
    "best_of_n": COUNT * T,
    "smc": COUNT * T,
    "dps": T,
    "unguided": T,
}


@pytest.mark.parametrize("reward", ["compressibility", "aesthetic"])
def test_every_method_of_the_paper_runs(reward, sd15, tiny_clip, tiny_head, tmp_path, monkeypatch, read_rows):
    """The commands of the files' comments, with tiny models, fewer steps and images; a value is fitted first."""
    monkeypatch.chdir(tmp_path)
    clip = {"init_args": {"pretrained": tiny_clip}}
    model = {"diffusion": {"init_args": {"pretrained": sd15, "num_inference_steps": T}}}
    if reward == "aesthetic":
        model["reward"] = {"class_path": "Aesthetic", "init_args": {"pretrained": tiny_clip, "head": tiny_head}}
    here = {"data": {"limit": 1}, "trainer": {"accelerator": "cpu", "devices": 1}}
    (tmp_path / "predict.yaml").write_text(
        yaml.safe_dump(
            here | {"model": model | {"eval_rewards": [{"class_path": "CLIPScore"} | clip], "images_per_prompt": 1}}
        )
    )
    value = {"pretrained_clip": tiny_clip} if reward == "aesthetic" else {"channels": 4}
    fitted = here["data"] | {"num_rollouts": 6, "keep_every": 1}
    (tmp_path / "fit.yaml").write_text(
        yaml.safe_dump(
            {
                "model": model | {"value": {"init_args": value}},
                "data": fitted,
                "trainer": here["trainer"] | {"max_epochs": 1},
            }
        )
    )
    words = ["--config", f"paper/fit_{reward}", "--config", "fit.yaml", "--output", "value"]
    assert main(["fit", "--config", "paper/sd15", *words]) == 0
    for method, rows in ROWS.items():
        if reward == "aesthetic" and method not in (None, "svdd_mc", "dps"):
            continue  # the same files as with the other reward
        words = ["--config", f"paper/{reward}", *(["--config", f"paper/{method}"] if method else [])]
        if method == "svdd_mc" or (method == "dps" and reward == "compressibility"):
            words += ["--ckpt_path", "value/value.safetensors"]
        words += ["--config", "predict.yaml", "--output", str(method)]
        assert main(["predict", "--config", "paper/sd15", *words]) == 0
        (row,) = read_rows(tmp_path / str(method))
        assert row["prompt"] == "cat"
        assert row["ledger"]["denoiser_rows"] == rows
    tested = {"sd15", "compressibility", "aesthetic", "fit_compressibility", "fit_aesthetic"} | ROWS.keys() - {None}
    assert tested <= {path.stem for path in CONFIGS.glob("*.yaml")}
