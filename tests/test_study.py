"""`svdd study`: the file, the runs, several processes, and what a failure leaves."""

import json
from collections import deque
from pathlib import Path

import pytest
import yaml

from benchmarks.study import differences
from svdd import UserError
from svdd.__main__ import main
from svdd.assets.loaded import keeping_weights
from svdd.commands.cells import attempt
from svdd.commands.drawing import _Report
from svdd.commands.plans import Plan
from svdd.commands.study import study
from svdd.evaluation.studies.specification import Cell, Specification, words_of
from svdd.rewards.base import Reward
from svdd.rewards.clip import CLIPScore
from svdd.runs.processes.work import Job, Order, Work
from svdd.runs.processes.workers import Link, Workers
from tests.toy_worker import toy

REPOSITORY = Path(__file__).parent.parent
STUDIES = sorted((REPOSITORY / "configs" / "studies").glob("*.yaml"))
GRID = """
base: quickstart
settings: {data.limit: 2, model.sampler.alpha: 1.0}
guides:
  JPEG: {model.reward: Compressibility, model.eval_rewards: [[CLIPScore, Sharpness]]}
  CLIP: {model.reward: CLIPScore}
variants:
  plain: {model.sampler: Unguided}
  SVDD: {model.sampler: SVDD, model.sampler.alpha: [0.0, auto], data: {batch_size: 3}}
  SMC: {model.sampler.resampler: [ssp], model.sampler: SMC, budgets: [400, null]}
budgets: [100, 200]
baseline: plain
statistics: [median, top10]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "study.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def expand(path: Path, **more):
    found = Specification.read(path, {name.replace("__", "."): value for name, value in more.items()})
    return found.study(path.parent, lambda words: "Guide", lambda words: "--model.sampler=Unguided" not in words)


def test_lists_become_a_grid(tmp_path):
    study = expand(write(tmp_path, GRID), data__limit="1")
    names = ["plain", "SVDD_alpha=0.0-100", "SVDD_alpha=0.0-200", "SVDD_alpha=auto-100", "SVDD_alpha=auto-200"]
    names += ["SMC-400", "SMC"]
    assert [cell.name for cell in study.cells] == [f"{guide}-{name}" for guide in ("JPEG", "CLIP") for name in names]
    assert (study.baseline, study.statistics, study.folder) == ("plain", ["median", "top10"], tmp_path)
    first, second, *_, last = study.cells
    assert (first.guide, first.variant, first.budget) == ("JPEG", "plain", None)
    assert (second.guide, second.variant, second.budget) == ("JPEG", "SVDD alpha=0.0", 100)
    assert second.folder == tmp_path / "cells" / second.name
    assert first.words == [
        *("--config", "quickstart", "--model.sampler.alpha=1.0", "--model.reward=Compressibility"),
        *('--model.eval_rewards=["CLIPScore", "Sharpness"]', "--model.sampler=Unguided", "--data.limit=1"),
        *("--model.budget=null", "--output", str(first.folder)),
    ]
    options = ["--model.reward=Compressibility", '--model.eval_rewards=["CLIPScore", "Sharpness"]']
    options += ["--model.sampler=SVDD", "--data.batch_size=3", "--model.sampler.alpha=0.0", "--data.limit=1"]
    assert second.words[2:-2] == [*options, "--model.budget=100"]
    assert last.words[3:-2] == [
        *("--model.reward=CLIPScore", "--model.sampler=SMC", "--model.sampler.resampler=ssp", "--data.limit=1"),
        "--model.budget=null",
    ]


def test_a_study_needs_no_base(tmp_path):
    (cell,) = expand(write(tmp_path, "settings: {model.reward: Brightness}\nvariants: {a: {data.limit: 1}}")).cells
    assert cell.words[:-2] == ["--model.reward=Brightness", "--data.limit=1"]


def test_folders_have_new_valid_names(tmp_path):
    variants = {f"a{'b' * 100}": {}, "A/b": {}, "a?b": {}, "a_B": {}, "..": {}, "ä": {}}
    text = {"base": "quickstart", "variants": {name: {"data.limit": 1} for name in variants}}
    names = [cell.name for cell in expand(write(tmp_path, yaml.safe_dump(text, sort_keys=False))).cells]
    assert len({name.lower() for name in names}) == len(variants)
    assert all(name.strip("._") and len(name) <= 89 and "/" not in name for name in names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("budget: [3]", "unknown key 'budget'; known: base, settings, guides, variants, budgets, baseline, statistics"),
        ("- 1", "a study: expected a mapping with base, settings"),
        ("base: 3", "base must be the name of a configuration, or a list of them, got 3"),
        ("variants:", "variants: expected a mapping with text as keys, got None"),
        ("variants: [SVDD]", "variants: expected a mapping with text as keys, got ['SVDD']"),
        ("variants: {SVDD: SVDD}", "variants.SVDD: expected a mapping with text as keys, got 'SVDD'"),
        ("variants: {a: 5}", "variants.a: expected a mapping with text as keys, got 5"),
        ("variants: {a: budgets}", "variants.a: expected a mapping with text as keys, got 'budgets'"),
        ("guides: {G: 5}", "guides.G: expected a mapping with text as keys, got 5"),
        ("variants: {a: {data.prompts: 2024-01-01}}", "datetime.date(2024, 1, 1) is no text and no number; put it in"),
        ("variants: {a: {x.y: {2024-01-01: 1}}}", "a key is no text (keys must be str"),
        (
            f"variants: {{a: {{x.y: {[*range(101)]}, x.z: {[*range(100)]}}}}}",
            "variants.a: its lists make more than 10000 runs; split the study",
        ),
        ("variants: {a: {sampler SVDD: 1}}", "variants.a: 'sampler SVDD' is no setting, expected a dotted key"),
        ("variants: {a: {model.sampler: []}}", "variants.a.model.sampler: the list is empty"),
        ("variants: {a: {model.budget: 3}}", "variants.a.model.budget is set by the study: use budgets"),
        ("settings: {output: x}", "settings.output is set by the study: use svdd study --output"),
        ("budgets: [0]", "budgets must be a list of integers >= 1, denoiser rows per image, got [0]"),
        ("budgets: [5, 5]", "budgets has the same budget twice"),
        ("variants: {plain: {budgets: x}}", "variants.plain.budgets must be a list of integers"),
        ("guides: {G: {budgets: 4, model.seed: 1}}", "guides.G.budgets: a guide has no budgets"),
        (
            "baseline: plan",
            "baseline 'plan' is no variant; known: plain, SVDD alpha=0.0, SVDD alpha=auto, SMC; did you",
        ),
        ("statistics: [mode]", "statistics must be a list of mean, median, top10, top20, got 'mode'"),
        ("variants: {a: {x.y: 1}, b: {x.y: 2}, a: {x.y: 3}}", "YAML key 'a' stands twice in one mapping"),
        ("base: [", "cannot be read as YAML"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, change, message):
    key = change.partition(":")[0]
    kept = {name: entry for name, entry in yaml.safe_load(GRID).items() if name != key}
    text = change if change.startswith("-") else f"{yaml.safe_dump(kept, sort_keys=False)}\n{change}\n"
    with pytest.raises(UserError) as caught:
        expand(write(tmp_path, text))
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "study.yaml"))
    assert "\n" not in str(caught.value)


class Fragile(Reward):
    """Mean brightness; fails while a file exists."""

    trap: Path

    def forward(self, images, prompts):
        if self.trap.exists() and "apple" not in prompts[0]:
            raise ValueError("the lights went out")
        return images.mean((1, 2, 3))


SMALL = """
base: quickstart
settings:
  data.prompts: [red apple, blue car]
  data.batch_size: 1
  model.diffusion.num_inference_steps: 2
guides:
  CLIP: {model.reward: CLIPScore, model.eval_rewards: [[Sharpness]]}
variants:
  plain: {model.sampler: Unguided}
  SVDD: {model.sampler: SVDD, model.diffusion.guidance_scale: 2.0}
  broken: {model.sampler: Unguided, model.reward: tests.test_study.Fragile, model.seed: 3}
budgets: [1, 5]
baseline: plain
"""


def test_a_study_draws_what_predict_draws_and_continues(tmp_path, capsys, monkeypatch):
    """One run fails in its second batch, and one for good: its budget is too small for the sampler."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Fragile, "trap", tmp_path / "trap", raising=False)
    (tmp_path / "trap").touch()
    write(tmp_path, SMALL)
    words = ["study", "study.yaml", "--output", "study", "--model.images_per_prompt", "1"]
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 3
    printed = capsys.readouterr().err
    assert "CLIP-SVDD-1 failed: budget=1 is too small: SVDD with num_candidates=1 costs 2 denoiser rows" in printed
    assert "CLIP-broken failed: reward Fragile failed with ValueError: the lights went out" in printed
    assert "svdd: 2 of 4 runs failed; the same command tries them again" in printed
    cells = {path.name: path for path in (tmp_path / "study" / "cells").iterdir()}
    assert len(read_rows_of(cells["CLIP-broken"])) == 1
    stamps = {name: (cells[name] / "results.jsonl").stat().st_mtime_ns for name in ("CLIP-plain", "CLIP-SVDD-5")}
    (tmp_path / "trap").unlink()
    text = SMALL.replace("[1, 5]", "[5]").replace("plain: {", "plain: {model.seed: 7, ")
    write(tmp_path, text)  # a run less, and one with other settings
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 3
    printed = capsys.readouterr()
    assert "3 runs, 1 of them finished" in printed.out
    assert "[2/3] CLIP-broken: done" in printed.out
    assert "CLIP-plain holds a run with other settings: model.seed was 0, now 7" in printed.err
    assert "svdd: 1 of 3 runs failed" in printed.err
    assert {name: (cells[name] / "results.jsonl").stat().st_mtime_ns for name in stamps} == stamps
    assert (tmp_path / "study" / "study.csv").read_text().count("\n") == 1 + 3 * 2
    for cell in expand(Path("study.yaml"), model__images_per_prompt="1").cells[1:]:
        assert main(["predict", *cell.words[:-1], f"single/{cell.name}"]) == 0
        assert differences(Path("study/cells", cell.name), Path("single", cell.name)) == []


def read_rows_of(folder: Path) -> list[dict]:
    lines = [line for path in folder.glob("results*.jsonl") for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("path", STUDIES, ids=[path.name for path in STUDIES])
def test_every_shipped_study_can_be_drawn(path, tmp_path):
    """All settings are those of `svdd predict`; one run is drawn, with fewer steps."""
    more = {"data.limit": "1", "model.diffusion.num_inference_steps": "2"}
    study = Specification.read(path, more).study(tmp_path, lambda words: "", lambda words: False)
    cells = {cell.variant: cell for cell in reversed(study.cells)}  # of the first guide
    plans = {name: Plan(cell.words) for name, cell in cells.items()}
    guide = {"emoji": "Compressibility", "trade_off": "WeightedSum"}[path.stem]
    assert {plan.guide for plan in plans.values()} == {guide}
    assert [name for name, plan in plans.items() if not plan.takes_budget] == ["unguided"]
    cells = [cells["unguided"]]
    with keeping_weights():
        assert attempt(Order("draw", cells[0].name, cells[0].words)) == ""
    assert len(read_rows_of(cells[0].folder)) == 2


class Direct(Link):
    """Answers in this process; before the second batch of the owner, a helper draws one."""

    def __init__(self, work: Work, number: int, order: Order | None = None) -> None:
        self._work, self._number, self._order = work, number, order
        self._asked = 0

    def tell(self, *message):
        {"begin": self._work.begin, "end": lambda *rest: self._work.end(self._number, *rest)}[message[0]](*message[1:])

    def ask(self, *message, waiting=lambda: None):
        self._asked += 1
        if self._order is not None and self._asked == 2:
            helper, order = Direct(self._work, 1), self._work.next(1)
            assert order.kind == "assist"
            helper.tell("end", order.name, attempt(order, helper, 1))
        if self._order is None and self._asked == 2:  # the helper leaves after a batch
            self._work.take(self._number, *message[1:])
            self._work.lose(self._number)
            return [], []
        return self._work.take(self._number, *message[1:])


def test_processes_share_the_batches_of_a_run(tmp_path):
    settings = {"data.prompts": ["apple", "car", "panda", "house"], "data.batch_size": 1}
    settings |= {"model.diffusion.num_inference_steps": 2, "model.sampler": "SVDD", "model.sampler.num_candidates": 2}
    words = words_of(("quickstart",), settings)
    work = Work([Job("run", [*words, "--output", str(tmp_path / "shared")])])
    with keeping_weights():
        order = work.next(0)
        assert attempt(order, Direct(work, 0, order), 0) == ""
        assert attempt(Order("draw", "run", [*words, "--output", str(tmp_path / "alone")])) == ""
    assert differences(tmp_path / "shared", tmp_path / "alone") == []


def test_weights_are_loaded_once_and_state_is_not_kept(monkeypatch):
    from svdd.assets.loaded import next_run
    from svdd.diffusion import latent
    from svdd.rewards.clip import CLIPScore

    loads = []
    load = latent.load_pipeline
    monkeypatch.setattr(latent, "load_pipeline", lambda *words: loads.append(words) or load(*words))

    def build(context: str, **options):
        next_run(context)
        clip, other = CLIPScore(), CLIPScore()
        return latent_diffusion(**options), clip.network, other.network

    def latent_diffusion(**options):
        from svdd.diffusion.stable_diffusion import StableDiffusion

        return StableDiffusion("emoji", **options)

    with keeping_weights():
        first, clip, other = build("32", num_inference_steps=2)
        assert clip is not other  # as in a run of its own
        clip.text_features(["apple"])
        second, *clips = build("32", num_inference_steps=3, guidance_scale=2.0)
        assert {id(each) for each in clips} == {id(clip), id(other)}
        assert not any(each._texts for each in clips)
        third, *_ = build("16", num_inference_steps=2)
        fourth, *_ = build("16", num_inference_steps=2, parity=True)
    assert second.unet is first.unet
    assert (second.num_inference_steps, len(second.kernel.timesteps), second.guidance_scale) == (3, 3, 2.0)
    assert second.chunker is not first.chunker
    assert second.fingerprints() == first.fingerprints()
    assert len({id(each.unet) for each in (first, third, fourth)}) == len(loads) == 3


def test_workers_share_jobs_and_survive_deaths(tmp_path):
    """A job whose process dies is tried once more, and costs no other job."""
    work, events = Work([Job("good", ["x"], 2.0), Job("bad", []), Job("fatal", [], 0.5)]), []
    workers = Workers([{"OMP_NUM_THREADS": "1"}] * 3, toy, tmp_path / "logs")
    assert workers.serve(work, lambda *event: events.append(event)) is None
    workers.close()
    assert {job.name: job.state for job in work.jobs.values()} == {"good": "done", "bad": "failed", "fatal": "failed"}
    assert work.jobs["bad"].message == "refused"
    assert work.jobs["fatal"].message == "2 processes that drew it have died"
    assert events.count(("lost", "fatal")) == 2
    logs = "".join(path.read_text() for path in (tmp_path / "logs").iterdir())
    assert all(f"good [{k}]" in logs for k in range(4))


def test_batches_are_handed_out_once_and_again_if_lost():
    work = Work([Job("a", [], 2.0, "m"), Job("b", [], 1.0, "n"), Job("c", [], 0.5, "n")])
    assert [work.next(0).name, work.next(1).name] == ["a", "b"]
    work.begin("a", [[0, 1], [2, 3], [4]], 10.0)
    work.begin("b", [[0]], 10.0)
    assert work.take(1, "b", []) == ([0], [])
    assert work.take(1, "b", []) == ([], [])
    work.end(1, "b")
    assert work.next(1) == Order("draw", "c", [])  # of the same model
    work.end(1, "c", "no memory")
    assert work.next(1) == work.next(2) == Order("assist", "a", [])
    assert work.take(1, "a", []) == ([0, 1], [])
    assert work.take(2, "a", []) == ([2, 3], [])
    assert work.take(0, "a", []) == ([4], [])
    assert work.jobs["a"].rows_left == 50.0
    assert work.take(0, "a", ["own"]) is None  # two helpers draw
    assert work.take(1, "a", ["row 0", "row 1"]) == ([], [])
    work.end(1, "a")
    assert work.next(1) is None
    assert work.lose(2) == ["a"]
    assert work.take(0, "a", []) == ([2, 3], [])  # what the dead one has lost
    assert work.take(0, "a", []) == ([], ["row 0", "row 1"])
    work.end(0, "a")
    assert work.next(0) == Order("draw", "a", [])  # once more, as the dead one may have left a half-written file
    work.end(0, "a")
    assert work.next(0) == work.next(1) == Order("stop")
    assert [work.jobs[name].state for name in "abc"] == ["done", "done", "failed"]


def test_a_run_is_reported_once_also_where_helpers_leave_it_later(capsys):
    work = Work([Job("a", []), Job("b", [])])
    report = _Report(work, 3, 1)
    assert [work.next(0).name, work.next(1).name] == ["a", "b"]
    work.end(1, "b", "no memory")
    report("end", "b")
    work.begin("a", [[0], [1]], 10.0)
    assert work.next(1) == Order("assist", "a", [])
    work.end(0, "a")
    report("end", "a")
    work.end(1, "a")
    report("end", "a")
    captured = capsys.readouterr()
    assert captured.out.splitlines() == ["3 runs, 1 of them finished", "[3/3] a: done"]
    assert [line.partition(",")[0] for line in captured.err.splitlines()] == ["[2/3] b: failed: no memory"]


@pytest.mark.parametrize("name", ["dry_run", "overwrite"])
def test_a_configuration_may_not_say_what_the_study_decides(tmp_path, name):
    path = write(tmp_path, SMALL.replace("base: quickstart", f"base: [quickstart, {tmp_path / 'more.yaml'}]"))
    (tmp_path / "more.yaml").write_text(f"{name}: true")
    with pytest.raises(UserError, match=f"{name} is true in a configuration; remove it there, and "):
        study([str(path), "--output", str(tmp_path / "out"), "--dry_run"])


def test_the_command_line_names_what_it_cannot_use(tmp_path):
    with pytest.raises(UserError, match=r"unrecognized arguments: more\.yaml; `svdd study --help`"):
        study(["study.yaml", "more.yaml", "--output", str(tmp_path)])
    path = write(tmp_path, SMALL)
    with pytest.raises(UserError, match="out holds no run of a study; leave out --tables_only, or check --output"):
        study([str(path), "--tables_only", "--output", str(tmp_path / "out")])
    with pytest.raises(UserError, match=r"--model\.budget is set by the study: use budgets in its file"):
        study(["study.yaml", "--model.budget", "5", "--output", str(tmp_path)])
    with pytest.raises(UserError, match="nothing: no such file or shipped study"):  # not: expected true or false
        study(["--dry_run", "nothing", "--output", str(tmp_path)])


def test_a_list_given_later_keeps_no_arguments_of_an_earlier_one(tmp_path):
    reward = "{class_path: CLIPScore, init_args: {pretrained: emoji-judge}}"
    (tmp_path / "base.yaml").write_text(f"model: {{reward: Compressibility, eval_rewards: [{reward}]}}")
    (tmp_path / "more.yaml").write_text("model: {eval_rewards: [CLIPScore]}")
    base = ["--config", "quickstart", "--config", str(tmp_path / "base.yaml")]

    def judges(*words: str) -> list[str]:
        return [each.init_args.get("pretrained") for each in Plan([*base, *words]).settings.model.eval_rewards]

    plain = CLIPScore().pretrained
    assert judges() == ["emoji-judge"]
    assert judges('--model.eval_rewards=["CLIPScore"]') == judges("--config", str(tmp_path / "more.yaml")) == [plain]
    assert judges("--model.eval_rewards+=CLIPScore") == ["emoji-judge", plain]
    assert judges("--model.eval_rewards.pretrained=emoji") == ["emoji"]


def test_a_part_that_is_null_is_its_default(tmp_path):
    cell = Cell("a", "g", "v", None, {}, tmp_path)
    plan = Plan(["--config", "quickstart", "--model.sampler=null", "--model.diffusion=null"])
    assert plan.takes_budget
    Plan(["--model.reward=Brightness", "--data.prompts=[cat]"]).check_prompts()  # without rewards that are held out
    assert plan.job(cell).model == Plan([*plan._words[1:], "--model.sampler=Unguided"]).job(cell).model


def test_the_last_batch_of_a_run_counts_for_the_time_left():
    work = Work([Job("a", []), Job("b", [])])
    work.next(0)
    work.begin("a", [[0, 1], [2]], 10.0)
    assert [work.take(0, "a", []), work.take(0, "a", [])] == [([0, 1], []), ([2], [])]
    work.end(0, "a")  # Lightning knows the number of batches and asks for no other
    assert (work.drawn, work.jobs["a"].state, work.jobs["a"].left) == (30.0, "done", deque())
    work.next(0)
    work.begin("b", [[0]], 10.0)
    work.take(0, "b", [])
    work.end(0, "b", "no memory")
    assert work.drawn == 30.0


def test_a_stopped_study_hands_out_nothing():
    work = Work([Job("a", [])])
    work.next(0)
    work.begin("a", [[0]], 1.0)
    work.stopping = True
    assert work.take(0, "a", []) == ([], None)
    assert work.next(1) == Order("stop")


def test_a_guide_adds_settings_to_its_variants(tmp_path):
    """Configurations are joined; what a guide adds may make a grid of its own."""
    text = """
base: quickstart
guides:
  A: {config: a, model.reward: Compressibility, variants: {DPS: {model.sampler.scale: [1, 2]}}}
  B: {model.reward: CLIPScore}
variants:
  plain: {}
  DPS: {config: dps}
"""
    found = {cell.name: cell.words[2:-2] for cell in expand(write(tmp_path, text)).cells}
    assert found == {
        "A-plain": ["--config", "a", "--model.reward=Compressibility"],
        **{
            f"A-DPS_scale={scale}": [
                *("--config", "a", "--config", "dps", "--model.reward=Compressibility"),
                f"--model.sampler.scale={scale}",
            ]
            for scale in (1, 2)
        },
        "B-plain": ["--model.reward=CLIPScore"],
        "B-DPS": ["--config", "dps", "--model.reward=CLIPScore"],
    }
    with pytest.raises(
        UserError, match=r"guides.A.variants: 'DPT' is no variant; known: plain, DPS; did you mean 'DPS'"
    ):
        expand(write(tmp_path, text.replace("{DPS:", "{DPT:")))


def test_a_dry_run_names_the_runs_that_cannot_be_drawn(tmp_path, capsys):
    text = "{base: quickstart, settings: {data.prompts: none.txt}, variants: {plain: {model.sampler: Unguided}}}"
    with pytest.raises(SystemExit) as ended:
        main(["study", str(write(tmp_path, text)), "--output", str(tmp_path / "out"), "--dry_run"])
    error = capsys.readouterr().err
    assert ended.value.code == 3
    assert "plain cannot be drawn: none.txt: no such file" in error
    assert "1 of 1 runs cannot be drawn" in error
    assert not (tmp_path / "out").exists()
