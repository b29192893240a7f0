"""`GuidedDiffusion` inside and outside a Trainer: seeds, rows, statistics, precision."""

import json
import re
import warnings

import lightning as L
import numpy as np
import pytest
import torch

import svdd.samplers
from svdd import UserError
from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.evaluation.selections import idle
from svdd.guided_diffusion import GuidedDiffusion
from svdd.rewards.clip import CLIPScore
from svdd.rewards.jpeg import Compressibility, Incompressibility
from svdd.runs.prompts import Prompt, PromptDataModule
from svdd.samplers.best_of_n import BestOfN
from svdd.samplers.blockwise_best_of_n import BlockwiseBestOfN
from svdd.samplers.dps import DPS
from svdd.samplers.refinement import Refinement
from svdd.samplers.smc import SMC
from svdd.samplers.svdd import SVDD
from svdd.samplers.twisted_smc import TwistedSMC
from svdd.samplers.unguided import Unguided
from tests.analytic import GaussianDiffusion, Linear
from tests.test_samplers import label

PROMPTS = [
    {"prompt": "red apple", "negative_prompt": "blurry", "style": "photo", "seed": 40},
    {"prompt": "blue car", "style": "drawing"},
    {"prompt": "panda", "style": "drawing", "seed": 2**64 - 1},
]


class Collect(L.Callback):
    """Collects the outputs of `predict_step`."""

    def __init__(self):
        self.predictions = []

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.predictions.append(outputs)

    @property
    def rows(self):
        return [row for prediction in self.predictions for row in prediction.rows]

    @property
    def images(self):
        return torch.cat([prediction.images for prediction in self.predictions])


@pytest.fixture
def prompts(tmp_path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    return str(path)


def predict(model, prompts, tmp_path, batch_size=2, **options):
    collect = Collect()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[collect],
        **{"logger": False} | options,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(does not have many workers|predict_dataloader).*")
        trainer.predict(model, PromptDataModule(prompts, batch_size=batch_size), return_predictions=False)
    return collect


def model_of(folder, **options):
    defaults = {"diffusion": StableDiffusion(folder, 2), "sampler": SVDD(2), "images_per_prompt": 2, "seed": 100}
    return GuidedDiffusion(**{"reward": Compressibility()} | defaults | options)


# ---- outside a Trainer


def test_sample_returns_images_and_their_scores(sd15):
    model = model_of(sd15)
    images, scores = model.sample(["red apple", "panda", "panda"], seed=3)
    assert images.shape == (3, 3, 64, 64)
    assert images.dtype == scores.dtype == torch.float32
    assert 0 <= images.min() <= images.max() <= 1
    assert not images.requires_grad
    assert torch.equal(scores, Compressibility().score(images, [""] * 3))
    again, _ = model.sample(["red apple", "panda", "panda"], seed=3)
    assert torch.equal(again, images)
    assert not torch.equal(images[1], images[2])


def test_sample_accepts_one_prompt_and_explicit_seeds(sd15):
    model = model_of(sd15, diffusion=StableDiffusion(sd15, 2, chunk_size=1))
    images, scores = model.sample("panda", seed=8)
    assert (images.shape, scores.shape) == ((1, 3, 64, 64), (1,))
    several, _ = model.sample(["x", "panda", "y"], seed=7)
    assert torch.equal(several[1:2], images)
    chosen, _ = model.sample(["panda", "x"], seeds=[8, 7])
    assert torch.equal(chosen, several[[1, 0]])


def test_sample_does_not_change_the_global_generator(sd15):
    before = torch.get_rng_state()
    model_of(sd15).sample("panda")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_custom_diffusion_works_without_other_changes():
    model = GuidedDiffusion(Linear([1.0, 0.0]), GaussianDiffusion(3), SVDD(4))
    guided, scores = model.sample([""] * 50)
    assert guided.shape == (50, 3, 1, 2)
    plain, _ = GuidedDiffusion(Linear([1.0, 0.0]), GaussianDiffusion(3), Unguided()).sample([""] * 50)
    assert scores.mean() > plain[:, 0, 0, 0].mean() + 0.5


def test_predict_step_outside_a_trainer_returns_detached_images(sd15):
    prediction = model_of(sd15, sampler=Unguided()).predict_step([Prompt(0, "a", None, None, {})], 0)
    assert not prediction.images.requires_grad


# ---- rows


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_rows_are_ordered_and_complete(sd15, prompts, tmp_path, batch_size):
    collect = predict(model_of(sd15, eval_rewards=[Incompressibility()]), prompts, tmp_path, batch_size)
    rows = collect.rows
    assert len(collect.predictions) == -(-3 // batch_size)
    assert [(row["prompt_index"], row["image_index"]) for row in rows] == [(p, k) for p in range(3) for k in range(2)]
    assert [row["prompt"] for row in rows] == [prompt["prompt"] for prompt in PROMPTS for _ in range(2)]
    assert [row["style"] for row in rows] == ["photo"] * 2 + ["drawing"] * 4
    assert [row.get("negative_prompt") for row in rows] == ["blurry", "blurry", None, None, None, None]
    assert ["negative_prompt" in row for row in rows] == [True, True, False, False, False, False]
    assert [row["seed"] for row in rows] == [40, 41, 100 + 2, 100 + 3, 2**64 - 1, 0]  # the last one wraps around
    assert collect.images.shape == (6, 3, 64, 64)
    scores = Compressibility().score(collect.images, [""] * 6).tolist()
    for row, score in zip(rows, scores, strict=True):
        assert list(row["rewards"]) == ["Compressibility", "Incompressibility"]
        assert (
            row["rewards"]["Compressibility"] == -row["rewards"]["Incompressibility"] == pytest.approx(score, rel=1e-6)
        )
        ledger = row["ledger"]
        assert (ledger["denoiser_rows"], ledger["network_rows"]) == (3, 6)
        assert (ledger["decoded_images"], ledger["reward_calls"]) == (4, 4)
        assert ledger["total_seconds"] >= ledger["denoiser_seconds"] > 0
    json.dumps(rows)


def test_a_row_can_be_reproduced_from_its_seed_and_prompt(sd15, prompts, tmp_path):
    """A row can be reproduced from its seed and prompt; with one latent per call it is identical in every bit."""
    model = model_of(sd15, diffusion=StableDiffusion(sd15, 2, chunk_size=1))
    collect = predict(model, prompts, tmp_path, batch_size=3)
    with torch.no_grad():
        for row, image in zip(collect.rows, collect.images, strict=True):
            final = model.draw([row["prompt"]], [row["seed"]], [row.get("negative_prompt")])
            assert torch.equal(final.images[0], image)


def test_images_do_not_depend_on_the_batch_size(sd15, prompts, tmp_path):
    model = model_of(sd15, diffusion=StableDiffusion(sd15, 2, chunk_size=1))
    first, second = predict(model, prompts, tmp_path, 1), predict(model, prompts, tmp_path, 3)
    assert torch.equal(first.images, second.images)
    assert [row["rewards"] for row in first.rows] == [row["rewards"] for row in second.rows]


# ---- several ends of one image, and traces


def test_all_particles_are_returned_with_their_weights(sd15, prompts, tmp_path):
    sampler = SMC(3, alpha=0.5, returns="all", ess_threshold=1.0)
    collect = predict(model_of(sd15, sampler=sampler), prompts, tmp_path)
    rows, traces = collect.rows, [trace for prediction in collect.predictions for trace in prediction.traces]
    assert [(row["prompt_index"], row["image_index"]) for row in rows] == [(p, j) for p in range(3) for j in range(6)]
    assert [row["particle"] for row in rows] == [0, 1, 2] * 6
    assert {row["num_images"] for row in rows} == {6}
    assert [row["seed"] for row in rows[:6]] == [40] * 3 + [41] * 3
    for k in range(0, 18, 3):
        assert sum(row["particle_weight"] for row in rows[k : k + 3]) == pytest.approx(1, abs=1e-6)
        assert {row["ledger"]["denoiser_rows"] for row in rows[k : k + 3]} == {2}  # N T rows over N images
    assert collect.images.shape == (18, 3, 64, 64)
    scores = Compressibility().score(collect.images, [""] * 18)
    assert [row["rewards"]["Compressibility"] for row in rows] == pytest.approx(scores.tolist(), rel=1e-6)
    assert [(trace["prompt_index"], trace["image_index"]) for trace in traces] == [
        (p, j) for p in range(3) for j in (0, 3)
    ]
    for trace in traces:
        assert trace["step"] == [1, 2]
        assert len(trace["lineage"]) == len(trace["ess"]) == 2
    json.dumps(traces)


def test_every_image_with_a_selection_has_a_trace(sd15, prompts, tmp_path):
    chosen = predict(model_of(sd15), prompts, tmp_path)
    traces = [trace for prediction in chosen.predictions for trace in prediction.traces]
    rows = {(row["prompt_index"], row["image_index"]): row for row in chosen.rows}
    assert [(trace["prompt_index"], trace["image_index"]) for trace in traces] == list(rows)
    for trace in traces:
        reward = rows[trace["prompt_index"], trace["image_index"]]["rewards"]["Compressibility"]
        assert trace["value_chosen"][-1] == pytest.approx(reward, rel=1e-6)
        assert "lineage" not in trace
    plain = predict(model_of(sd15, sampler=Unguided()), prompts, tmp_path)
    assert all(prediction.traces == [] for prediction in plain.predictions)
    assert all("particle_weight" not in row and "particle" not in row for row in plain.rows)


# ---- gradients


@pytest.mark.parametrize("sampler", [DPS(5.0), DPS(5.0, through_denoiser=False), TwistedSMC(2, alpha=0.1)], ids=label)
@pytest.mark.parametrize("mode", [True, False], ids=["inference mode", "no_grad"])
def test_gradient_samplers_work_in_any_trainer(sd15, tiny_clip, prompts, tmp_path, sampler, mode):
    reward, held_out = CLIPScore(tiny_clip), Compressibility()
    model = model_of(sd15, reward=reward, eval_rewards=[held_out], sampler=sampler)
    collect = predict(model, prompts, tmp_path, inference_mode=mode)  # two batches: the second uses cached texts
    plain = predict(model_of(sd15, reward=reward, eval_rewards=[held_out], sampler=Unguided()), prompts, tmp_path)
    assert not collect.images.requires_grad
    assert (collect.images != plain.images).flatten(1).any(1).all()
    rows = 6 * (4 if isinstance(sampler, TwistedSMC) else 2)  # 6 images, T = 2
    assert model.summary["ledger"]["denoiser_rows"] == rows
    assert model.summary["ledger"]["gradient_rows"] == (0 if not getattr(sampler, "through_denoiser", True) else rows)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_gradient_sampler_increases_its_reward(sd15, tiny_clip):
    reward = CLIPScore(tiny_clip)
    means = [
        float(GuidedDiffusion(reward, StableDiffusion(sd15, 6), DPS(scale)).sample(["panda"] * 4)[1].mean())
        for scale in (0.0, 30.0, 300.0)
    ]
    assert means == sorted(means)
    assert means[2] > means[0] + 0.01


# ---- summary


def assert_summary(model, rows):
    indices = sorted({row["prompt_index"] for row in rows})
    for name in model.rewards:
        scores = np.array([row["rewards"][name] for row in rows])
        means = [np.mean([row["rewards"][name] for row in rows if row["prompt_index"] == k]) for k in indices]
        expected = {
            "count": len(scores),
            "mean": scores.mean(),
            "std": scores.std(ddof=1),
            "standard_error": np.std(means, ddof=1) / len(means) ** 0.5 if len(means) > 1 else np.nan,
            "min": scores.min(),
            "max": scores.max(),
            "median": np.median(scores),
            "top10": np.quantile(scores, 0.9),
            "top20": np.quantile(scores, 0.8),
        }
        found = dict(model.summary["rewards"][name])
        low, high = found.pop("ci95_low"), found.pop("ci95_high")
        assert np.isnan(found.pop("std_within")) == (len(rows) == len(indices))
        assert np.isnan(low) if len(indices) == 1 else low <= expected["mean"] <= high
        assert found == pytest.approx(expected, rel=1e-12, nan_ok=True)


def test_the_summary_is_that_of_the_rows(sd15, tiny_clip, prompts, tmp_path):
    clip = CLIPScore(tiny_clip)
    model = model_of(sd15, eval_rewards=[clip], sampler=BestOfN(2))
    rows = predict(model, prompts, tmp_path).rows
    assert list(model.summary["rewards"]) == ["Compressibility", clip.name]
    assert model.summary["guide"] == "Compressibility"
    assert_summary(model, rows)
    assert len({row["rewards"][clip.name] for row in rows}) == 6
    totals = model.summary["ledger"]
    assert totals["denoiser_rows"] == 6 * 4 == sum(row["ledger"]["denoiser_rows"] for row in rows)
    assert totals["network_rows"] == 2 * totals["denoiser_rows"]
    assert totals["decoded_images"] == totals["reward_calls"] == 12
    assert model.summary["denoiser_rows_per_image"] == 4
    assert model.summary["network_rows_per_image"] == 8
    json.dumps(model.summary)


def test_all_particles_count_by_their_weights(prompts, tmp_path):
    """Without resampling, the unweighted mean would be that of plain sampling."""
    sampler = SMC(400, 0.3, returns="all", ess_threshold=0.0)
    model = GuidedDiffusion(Linear([0.6, -0.8]), GaussianDiffusion(4), sampler, images_per_prompt=2)
    rows = predict(model, ["0"] * 10, tmp_path).rows
    found = model.summary["rewards"]["Linear"]
    images = [rows[k : k + 400] for k in range(0, len(rows), 400)]
    means = [sum(row["particle_weight"] * row["rewards"]["Linear"] for row in image) for image in images]
    assert found["count"] == 8000
    assert found["mean"] == pytest.approx(np.mean(means), rel=1e-6)
    assert found["mean"] > np.mean([row["rewards"]["Linear"] for row in rows]) + 0.5
    prompts = np.reshape(means, (10, 2)).mean(1)
    assert found["standard_error"] == pytest.approx(prompts.std(ddof=1) / 10**0.5, rel=1e-5)
    assert found["median"] > found["mean"] - found["std"]
    model.on_predict_start()
    for start in range(0, len(rows), 999):  # a resumed run adds rows in other batches
        model.record(rows[start : start + 999])
    model.on_predict_epoch_end()
    assert model.summary["rewards"]["Linear"] == found


@pytest.mark.parametrize("sampler", [SVDD(2), SMC(2), DPS(1.0), TwistedSMC(2)], ids=label)
def test_inference_mode_is_off_only_where_gradients_are_needed(sampler):
    """The inference mode is the one that the Trainer sets around `predict_step`."""
    seen = set()

    class Watching(Linear):
        def forward(self, images, prompts):
            seen.add(torch.is_inference_mode_enabled())
            return super().forward(images, prompts)

    model = GuidedDiffusion(Watching([1.0, 0.0]), GaussianDiffusion(3), sampler)
    with torch.inference_mode():
        model.draw([""], [0])
    assert seen == {not sampler.needs_gradient}


def test_a_second_prediction_starts_anew(sd15, prompts, tmp_path):
    model = model_of(sd15, sampler=Unguided())
    predict(model, prompts, tmp_path)
    first = model.summary["rewards"]
    with torch.inference_mode():  # as in an interrupted prediction
        row = {"prompt_index": 0, "rewards": {"Compressibility": 5.0}, "path_kl_sample": 0.0}
        model.record([row | {"ledger": dict.fromkeys(model.statistics.work, 1.0)}])
    predict(model, prompts, tmp_path)
    assert model.summary["rewards"] == first


def test_a_module_that_a_trainer_used_still_works_without_one(sd15, prompts, tmp_path):
    model = model_of(sd15, sampler=Unguided())
    predict(model, prompts, tmp_path)
    with torch.no_grad():
        model.predict_step([Prompt(0, "a", None, None, {})], 0)


def test_loggers_get_the_statistics(sd15, prompts, tmp_path):
    logger = L.pytorch.loggers.CSVLogger(tmp_path, "log")
    model = model_of(sd15, sampler=Unguided())
    predict(model, prompts, tmp_path, logger=logger)
    logger.save()
    header, values = (tmp_path / "log/version_0/metrics.csv").read_text().splitlines()[:2]
    logged = dict(zip(header.split(","), values.split(","), strict=True))
    assert float(logged["Compressibility/mean"]) == pytest.approx(model.summary["rewards"]["Compressibility"]["mean"])


def test_one_image_has_a_mean_and_no_spread(sd15, tmp_path):
    model = model_of(sd15, images_per_prompt=1, sampler=Unguided())
    rows = predict(model, ["panda"], tmp_path).rows
    statistics = model.summary["rewards"]["Compressibility"]
    assert statistics["mean"] == statistics["top10"] == rows[0]["rewards"]["Compressibility"]
    assert np.isnan(statistics["std"])


def test_counts_that_do_not_divide_add_up_again(sd15):
    from svdd.state.ledger import Ledger

    model = model_of(sd15)
    share = Ledger(denoiser_rows=7).per_image(3)
    model.record([{"prompt_index": 0, "rewards": {"Compressibility": 1.0}, "path_kl_sample": 0.0, "ledger": share}] * 3)
    model.on_predict_epoch_end()
    assert model.summary["ledger"]["denoiser_rows"] == 7


# ---- what the selections came to


def summary_of(sampler, b=(0.6, -0.8), old=False):
    """Returns the model and its summary of 3 prompts x 2 images; `old` rows lack what the selections came to."""
    model = GuidedDiffusion(Linear(list(b)), GaussianDiffusion(6), sampler, images_per_prompt=2)
    rows = model.predict([Prompt(k, str(k), None, None, {}) for k in range(3)]).rows
    model.record([{key: row[key] for key in row if not (old and key == "selection")} for row in rows])
    model.on_predict_epoch_end()
    return model, rows


@pytest.mark.parametrize("sampler", [SMC(5), SMC(3, returns="all")], ids=label)
def test_the_summary_holds_what_the_selections_came_to(sampler):
    model, rows = summary_of(sampler)
    weights = [row.get("particle_weight", 1.0) for row in rows]
    for name in ("choices", "resamplings", "spread", "ess"):
        expected = np.average([row["selection"][name] for row in rows], weights=weights)
        assert model.summary[name] == pytest.approx(expected, rel=1e-6)
    alphas = [row["selection"]["alpha"] for row in rows]
    assert model.summary["alpha"] == pytest.approx(
        {"mean": np.average(alphas, weights=weights), "min": min(alphas), "max": max(alphas)}, rel=1e-6
    )
    assert min(alphas) < max(alphas)
    assert 0 < model.summary["ess"] < 1
    old, _ = summary_of(sampler, old=True)
    assert "resamplings" not in old.summary
    assert idle(old.sampler, old.summary) == ""


@pytest.mark.parametrize(
    ("sampler", "options", "words"),
    [
        (
            SMC(alpha=100.0),
            {},
            r"SMC never resampled: alpha=100 is large against .* 0\.\d+, .*; use a lower one, or alpha: auto",
        ),
        (
            SVDD(4, alpha=100.0),
            {},
            r"SVDD chose almost at random: alpha=100 is large against .*; use a lower one, or alpha: auto",
        ),
        (SMC(ess_threshold=0), {}, r"SMC never resampled: its particles met at the end only.* raise ess_threshold"),
        (SVDD(1), {}, "SVDD never had a choice: num_candidates=1 leaves nothing to choose from; raise it"),
        (SMC(), {"b": (0.0, 0.0)}, "SMC never had a choice: an image's rows had equal values"),
        (TwistedSMC(alpha=100.0), {}, "TwistedSMC never resampled: alpha=100 is large"),
        (SVDD({0.5: 1, 1.0: 1}), {}, "SVDD never had a choice: num_candidates=1 leaves nothing to choose from"),
        (Refinement(alpha=100.0, sampler=Unguided()), {}, "Refinement chose almost at random: alpha=100 is large"),
    ],
    ids=["never", "at random", "threshold 0", "one candidate", "equal values", "twisted", "schedule", "rounds"],
)
def test_selections_without_effect_are_reported(sampler, options, words):
    model, _ = summary_of(sampler, **options)
    assert re.search(words, idle(model.sampler, model.summary))


@pytest.mark.parametrize(
    "sampler", [Refinement(1, alpha=0.05, sampler=Unguided()), BlockwiseBestOfN(4, 6, alpha="auto")], ids=label
)
def test_one_selection_among_finished_images_is_no_lack_of_resampling(sampler):
    model, _ = summary_of(sampler)
    assert model.summary["choices"] == 1
    assert idle(model.sampler, model.summary) == ""


def test_no_sampler_with_default_settings_is_reported_as_idle():
    for name in svdd.samplers.__all__:
        if name != "Sampler":
            model, _ = summary_of(getattr(svdd.samplers, name)())
            assert idle(model.sampler, model.summary) == "", name


# ---- precision


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_half_precision_runs_and_counts_exactly(sd15, tiny_clip, prompts, tmp_path, precision):
    exact = predict(model_of(sd15, eval_rewards=[CLIPScore(tiny_clip)]), prompts, tmp_path)
    model = model_of(sd15, eval_rewards=[CLIPScore(tiny_clip)])
    collect = predict(model, prompts, tmp_path, precision=precision)
    assert collect.images.dtype == torch.float32
    assert collect.images.isfinite().all()
    assert model.diffusion.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
    assert_summary(model, collect.rows)
    assert model.summary["ledger"]["denoiser_rows"] == 6 * 3
    assert exact.images.shape == collect.images.shape
    if precision == "bf16-mixed":  # the same noise, so the same picture up to the network's rounding
        assert (collect.images - exact.images).abs().mean() < 0.05


# ---- refusals


def test_a_held_out_reward_outside_of_a_list_is_refused():
    with pytest.raises(UserError, match=r"eval_rewards must be a list of rewards, got .*in brackets"):
        GuidedDiffusion(Compressibility(), GaussianDiffusion(2), eval_rewards=Incompressibility())


@pytest.mark.parametrize("held_out", [[Compressibility()], [Incompressibility(), Incompressibility()]])
def test_two_rewards_of_one_name_are_refused(held_out):
    with pytest.raises(UserError, match=r"rewards need distinct names, got Compressibility, .*remove the duplicate"):
        GuidedDiffusion(Compressibility(), GaussianDiffusion(2), eval_rewards=held_out)


class Named(Compressibility):
    def __init__(self, name):
        super().__init__()
        self.label = name

    @property
    def name(self):
        return self.label


def test_rewards_may_have_any_name(sd15, tmp_path):
    names = ["v1.5", "v1_5", "keys", "a b/c"]
    guide, *held_out = (Named(name) for name in names)
    model = model_of(sd15, reward=guide, eval_rewards=held_out, sampler=Unguided())
    rows = predict(model, ["panda"], tmp_path).rows
    assert list(model.summary["rewards"]) == list(rows[0]["rewards"]) == names
    assert_summary(model, rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images_per_prompt": 0}, "images_per_prompt must be >= 1, got 0"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"diffusion": GaussianDiffusion(2, eta=0.0)}, "num_candidates=20 needs a chain with noise"),
    ],
)
def test_arguments_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GuidedDiffusion(**{"reward": Compressibility(), "diffusion": GaussianDiffusion(2)} | options)


def test_the_reward_exists_once(sd15):
    model = model_of(sd15)
    assert model.value.reward is model.reward
    assert [name for name, module in model.named_modules() if module is model.reward] == ["reward"]
