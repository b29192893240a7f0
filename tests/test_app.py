"""`svdd app`: its page in a real browser, what its server refuses, and what a visitor cannot name."""

import base64
import json
import shlex
import sys
from pathlib import Path

import pytest

from benchmarks.app_memory import Server
from svdd import UserError
from svdd.__main__ import main

pytest.importorskip("gradio", reason="gradio is not installed")

from svdd.commands.app.controls import arguments, controls_of, named_class
from svdd.commands.app.rewards import checked_reward, in_short
from svdd.commands.app.template import Template
from svdd.commands.registry import catalogue, import_all

STEPS, CANDIDATES = 4, 7  # with 7 candidates, the bytes do not depend on the batch or on the number of threads
REWARDS = [entry.name for entry in catalogue() if entry.kind == "reward"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    (temporary := folder / "temporary").mkdir()
    (folder / "tiny.yaml").write_text(f"""
model:
  reward: {{class_path: CLIPScore, init_args: {{pretrained: emoji}}}}
  eval_rewards: [{{class_path: CLIPScore, init_args: {{pretrained: emoji-judge}}}}, Brightness]
  diffusion: {{class_path: AutoDiffusion, init_args: {{pretrained: emoji, num_inference_steps: {STEPS}, eta: 1.0}}}}
  sampler: {{class_path: SVDD, init_args: {{num_candidates: {CANDIDATES}}}}}
  images_per_prompt: 2
data: {{prompts: [panda]}}
""")
    started = Server("--config", str(folder / "tiny.yaml"), "--max_rows", "800", TMPDIR=str(temporary))
    (private,) = temporary.glob("svdd-app-*")
    assert private.stat().st_mode & 0o777 == 0o700
    yield started
    assert [path for path in private.rglob("*") if path.is_file()] == []  # all pictures are in the page
    code, error = started.close()
    assert (code, error) == (0, "svdd: SIGINT: the current step is finished first; once more ends it at once\n")
    assert list(temporary.glob("svdd-app-*")) == []


class Visit:
    """The page in the browser."""

    def __init__(self, driver, url: str):
        self.driver = driver
        driver.get(url)
        self.wait(lambda: self.one("#draw"))

    def one(self, selector: str):
        return self.driver.find_element("css selector", selector)

    def text(self, name: str) -> str:
        return self.one(f"#{name}").text

    def wait(self, condition):
        from selenium.common.exceptions import WebDriverException
        from selenium.webdriver.support.wait import WebDriverWait

        waiting = WebDriverWait(self.driver, 30, poll_frequency=0.05, ignored_exceptions=[WebDriverException])
        return waiting.until(lambda _: condition())

    def fill(self, selector: str, text: str) -> None:
        from selenium.webdriver import Keys

        field = self.one(selector)
        field.click()
        field.send_keys(Keys.CONTROL + "a")
        field.send_keys(text + Keys.ENTER)

    def copied(self, name: str) -> str:
        """Clicks the copy button of a text and returns what the clipboard then holds."""
        self.one(f"#{name} button").click()
        return self.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])")

    def pictures(self) -> list[str]:
        found = self.driver.find_elements("css selector", "#pictures a[download]")
        return [picture.get_attribute("href") for picture in found]


def files_of(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((folder / "images").glob("*.png"))]


def test_a_visitor_draws_stops_and_copies(server, chromium, tmp_path, monkeypatch):
    origin = server.url.rstrip("/")
    permissions = ["clipboardReadWrite", "clipboardSanitizedWrite"]
    chromium.execute_cdp_cmd("Browser.grantPermissions", {"origin": origin, "permissions": permissions})
    chromium.execute_cdp_cmd("Network.enable", {})
    chromium.get_log("performance")
    chromium.get_log("browser")
    page = Visit(chromium, server.url)
    page.one("#draw").click()
    page.wait(lambda: "Done" in page.text("status"))
    shown = [base64.b64decode(uri.partition("base64,")[2]) for uri in page.pictures()]
    assert len(shown) == 4
    assert "CLIPScore-judge" in page.text("rewards")
    assert f"{1 + CANDIDATES * (STEPS - 1)}" in page.text("cost")
    assert page.one("#plot img").get_attribute("alt").startswith("Values at each step")
    command, yaml = page.copied("command"), page.copied("yaml")

    monkeypatch.chdir(tmp_path)
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:2] == ["svdd", "predict"]
    assert main(words[1:]) == 0
    Path("copied.yaml").write_text(yaml)
    plain = ["--config", "copied.yaml", "--output", "plain", "--model.sampler", "Unguided"]
    assert main(["predict", "--config", "copied.yaml", "--output", "again", "--trainer.accelerator", "cpu"]) == 0
    assert main(["predict", *plain, "--trainer.accelerator", "cpu"]) == 0
    guided, unguided = shown[1::2], shown[::2]
    assert files_of(Path("runs/app")) == files_of(Path("again")) == guided != unguided
    assert files_of(Path("plain")) == unguided

    page.fill("#steps input", "50")
    page.one("#draw").click()
    page.wait(lambda: "step" in page.text("status"))
    page.one("#stop").click()
    page.wait(lambda: page.text("status") == "Stopped.")
    page.wait(lambda: page.one("#draw").is_enabled())
    page.fill("#steps input", "100000")
    page.one("#draw").click()
    page.wait(lambda: "num_inference_steps must be a whole number from 1 to 1000" in page.text("status"))
    assert page.one("#status .svdd-error").is_displayed()

    assert page.one("#sampler-SVDD").is_displayed()
    page.fill("#sampler input", "SMC")
    page.wait(lambda: page.one("#sampler-SMC").is_displayed())
    page.one("#sampler-SMC button").click()
    page.wait(lambda: "ess_threshold" in page.text("sampler-SMC"))
    assert page.driver.find_elements("css selector", "#sampler-SVDD") == []
    assert chromium.get_log("browser") == []
    asked = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    urls = [each["params"]["request"]["url"] for each in asked if each["method"] == "Network.requestWillBeSent"]
    assert urls
    assert {url for url in urls if not url.startswith((origin, "data:", "blob:", "about:", "chrome"))} == set()


@pytest.mark.parametrize(
    "path",
    [
        *("/file=/etc/passwd", "/gradio_api/file=/etc/passwd", "/gradio_api/file/etc/passwd", "/gradio_api/info"),
        *("/assets/../../../../etc/passwd", "/assets/%2e%2e/%2e%2e/etc/passwd", "/static/..%2f..%2fetc/passwd"),
        *("/gradio_api/proxy=http://example.com", "/gradio_api/vibe-code/", "/gradio_api/upload_progress", "/docs"),
        *("/openapi.json", "/gradio_api/openapi.json", "/monitoring", "/gradio_api/runs", "//etc/passwd", "/svelte/x"),
    ],
)
def test_no_file_and_no_other_interface_is_served(server, path):
    answer = server.http.get(path)
    assert (answer.status_code, answer.text) == (404, "not part of this page\n")


def test_foreign_pages_uploads_and_large_requests_are_refused(server):
    assert server.http.get("/").status_code == 200
    policy = server.http.get("/").headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
    assert server.http.get("/", headers={"host": "rebound.example"}).status_code == 404
    assert server.http.post("/gradio_api/queue/join", headers={"origin": "http://evil.example"}).status_code == 404
    assert server.http.post("/gradio_api/upload", files={"files": b"x"}).status_code == 404
    assert server.http.post("/gradio_api/queue/join", content=b"x" * 300_000).status_code == 404


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"reward": "os.system"}, "registered rewards only"),
        ({"reward": "CLIPScore(pretrained='/etc')"}, "does not take pretrained='/etc'"),
        ({"reward": "FunctionReward(function='os.system')"}, "does not take function='os.system'"),
        ({"prompt": ["a", "list"]}, "prompt: expected a text"),
        ({"sampler": "subprocess.Popen"}, "unknown sampler"),
        ({"images": 10**6}, "images must be a whole number from 1 to 16"),
        ({"budget": 500}, "costs more than 800 denoiser rows"),
        ({"seed": float(2**60)}, "seed must be a whole number"),
    ],
)
def test_bad_input_is_one_message(server, changed, said):
    (*_, last) = server.draw("bad" + str(abs(hash(said))), **changed)
    assert said in last.replace("&#x27;", "'")
    assert "svdd-error" in last
    assert "Traceback" not in last


def test_previews_leave_gradients_and_a_budget_counts_before_the_default(server):
    found = server.draw("gradient", sampler="NoiseOptimisation", steps=20, images=1, budget=100)
    assert "Done" in found[-1]


def test_only_ones_own_job_is_stopped(server):
    server.send("begin", "one", [])
    server.send("draw", "one", server.values(steps=40, images=1))
    server.send("begin", "two", [])
    server.send("stop", "two", [])
    server.send("stop", "three", [])
    assert any("Done" in found for found in server.results("one"))
    server.send("draw", "two", server.values())  # as it was stopped while it waited
    assert "Stopped" in list(server.results("two"))[-1]


def test_a_closed_page_stops_its_job(server):
    with server.http.stream("GET", "/gradio_api/heartbeat/closed") as heartbeat:
        next(lines := heartbeat.iter_lines())  # the connection ends with the iterator
        server.send("begin", "closed", [])
        server.send("draw", "closed", server.values(steps=56))
        results = server.results("closed")
        while "Unguided: step" not in next(results):
            pass
        del lines
    assert "Stopped" in list(results)[-1]


def test_every_reward_that_names_a_file_or_a_module_is_refused(tmp_path, monkeypatch):
    import_all()
    monkeypatch.chdir(tmp_path)
    Path("my_rewards.py").write_text("raise RuntimeError('imported')")
    Path("Brightness + 1").write_text("class_path: os.system")
    bad = ["my_rewards.Redness", "2 * my_rewards.Redness + Brightness", "Threshold(reward=my_rewards.Redness)"]
    bad += [
        "WeightedSum(rewards=['my_rewards.Redness'])",
        "WeightedSum(rewards=[{'class_path': 'my_rewards.Redness'}])",
    ]
    hidden = "WeightedSum(rewards=[{'class_path': 'FunctionReward', '%s': {'function': 'os.system'}}])"
    bad += [
        hidden % "dict_kwargs",
        hidden % "init_args",
        "WeightedSum(rewards=[{'class_path': 'Brightness', 'init_args': 'x'}])",
    ]
    bad += ["Threshold(FunctionReward(function='os.system'))", "Threshold('os.system')", "Threshold(reward='Nothing')"]
    bad += ["ZScored(reward=Brightness, statistics='/etc/passwd')", "HTTPReward(url='http://localhost')"]
    bad += ["Aesthetic(head='x.pt')", "Brightness + 1", "a" * 501, "(" * 400, "", "my_rewards", "./my_rewards.py"]
    bad += [
        "Safety(0) + Nothing",
        "Brightness\n+ os.path",
        "CLIPScore(dtype='/dev/zero')",
        "VQAScore(batch_size=10**9)",
    ]
    for text in bad:
        with pytest.raises(UserError):
            checked_reward(text, REWARDS, frozenset())
    allowed = frozenset({("Aesthetic", "head", "'x.pt'")})
    assert checked_reward("Aesthetic(head='x.pt')", REWARDS, allowed)["class_path"] == "Aesthetic"
    for text in [
        "Brightness",
        "WinRate(reward=Brightness)",
        "Brightness - 0.5 * CLIPScore(pretrained=emoji-judge, dtype=bfloat16)",
    ]:
        settings = checked_reward(text, REWARDS, frozenset())
        assert checked_reward(in_short(settings), REWARDS, frozenset()) == settings


def test_every_sampler_has_controls_of_its_arguments():
    template = Template("fast")
    assert {*template.choices["sampler"]} == {entry.name for entry in catalogue() if entry.kind == "sampler"}
    for kind in ("sampler", "value"):
        for name in template.choices[kind]:
            known = named_class(kind, name)
            controls = controls_of(known)
            assert all(control.help for control in controls), name
            assert arguments(known, [control.default for control in controls], {}) == {}
    smc = {control.name: control for control in controls_of(named_class("sampler", "SMC"))}
    assert smc["resampler"].choices == ("multinomial", "stratified", "systematic", "residual", "ssp")
    assert (smc["alpha"].kind, smc["num_particles"].kind, smc["ess_threshold"].kind) == ("text", "integer", "number")
    given = [control.default for control in smc.values()]
    assert arguments(named_class("sampler", "SMC"), [6, "0.5", *given[2:]], {}) == {"num_particles": 6, "alpha": 0.5}
    for bad in (["8", "often"], [True, 1], [1e9, 1], [float("nan"), 1], [2.5, 1], [None, 1]):
        with pytest.raises(UserError):
            arguments(named_class("sampler", "SMC"), [*bad, *given[2:]], {})
    wanted = template.wanted(template.first())  # a schedule and a value with values inside stay as configured
    assert wanted.model["sampler"]["init_args"]["num_candidates"] == {0.2: 3, 0.5: 12, 1.0: 20}
    assert wanted.model["value"]["init_args"]["cheap"]["init_args"]["decoder"] == "tiny"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("model: {reward: {class_path: my_rewards.Brightness}}", "'my_rewards.Brightness': the page takes registered"),
        ("model: {sampler: my_samplers.SVDD}", "model.sampler is my_samplers.SVDD; the page takes registered"),
        ("data: emoji", "expected its parts as mappings"),
    ],
)
def test_a_configuration_with_classes_or_files_of_its_own_is_refused(settings, said, tmp_path):
    (tmp_path / "own.yaml").write_text(settings)
    with pytest.raises(UserError) as refused:
        (template := Template(str(tmp_path / "own.yaml"))).wanted(template.first())
    assert said in str(refused.value)


def test_the_copied_command_keeps_odd_texts():
    template = Template("weighted_sum")  # rewards around a reward that is only named
    form = template.first()._replace(held_out="Sharpness", prompt="-s 'it' \"q\"")
    assert template.wanted(form).model["reward"]["init_args"]["weights"] == [1.0, 1.0]
    for text in ["-s", "null", "a: b", "[x]", "C:\\x"]:
        words = shlex.split(template.wanted(form._replace(negative_prompt=text)).command("cpu").replace("\\\n", ""))
        model = json.loads(words[words.index("--model.diffusion") + 1])
        assert model["init_args"]["negative_prompt"] == text
    guided = template.wanted(form._replace(reward="-Brightness")).command("cpu")
    assert "--model.reward=-Brightness" in guided


def test_bad_options_are_one_line(capsys, monkeypatch):
    for words, said in [
        (["--config", "quickstrat"], "did you mean"),
        (["--rewards", "Brightnes"], "unknown Brightnes"),
        (["--host", "203.0.113.1"], "cannot listen at 203.0.113.1"),
        (["--max_rows", "0"], "max_rows"),
    ]:
        assert main(["app", "--port", "0", *words]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app"]) == 2
    assert "pip install 'svdd[app]'" in capsys.readouterr().err
