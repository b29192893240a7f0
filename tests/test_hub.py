"""Models from the hub, served on this machine: what is fetched, and what an error says; no code in a model is run."""

import ast
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, hf_api

import svdd
from svdd import UserError
from svdd.assets.hub import find_file, read_tokenizer, read_weights
from svdd.diffusion.lora import find_lora
from svdd.diffusion.stable_diffusion import StableDiffusion
from svdd.rewards.classifier import Classifier
from svdd.rewards.clip import CLIPScore
from svdd.rewards.image_reward import ImageReward

REFUSALS = {  # by name of the model: status, and the hub's code for the reason
    "none": (404, "RepoNotFound"),
    "gated": (403, "GatedRepo"),
    "revision": (404, "RevisionNotFound"),
    "denied": (403, ""),
}


class FakeHub(BaseHTTPRequestHandler):
    """The parts of the hub's interface that its client needs to read models, from folders owner/name."""

    root: Path
    asked: list[str]

    def do_GET(self) -> None:
        path = self.path.split("?")[0].strip("/")
        self.asked.append(f"{self.command} {path}")
        api, head = path.startswith("api/models/"), {"X-Repo-Commit": "0" * 40}
        owner, name, *rest = [*path.removeprefix("api/models/").split("/"), "", ""]
        folder, status, body = self.root / owner / name, 200, b""
        if refusal := REFUSALS.get(name):
            status, head["X-Error-Code"] = refusal
        elif path and not folder.is_dir():
            status, head["X-Error-Code"] = 404, "RepoNotFound"
        elif api:
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            names = [str(file.relative_to(folder)) for file in files]
            tree = [
                {"type": "file", "path": n, "size": f.stat().st_size, "oid": n}
                for n, f in zip(names, files, strict=True)
            ]
            info = {"id": f"{owner}/{name}", "sha": "0" * 40, "siblings": [{"rfilename": n} for n in names]}
            body = json.dumps(tree if "tree" in rest else info).encode()
        elif path:
            file = folder / "/".join(part for part in rest[2:] if part)
            if file.is_file():
                body, head["ETag"] = file.read_bytes(), f'"{file.name}-{file.stat().st_size}"'
            else:
                status, head["X-Error-Code"] = 404, "EntryNotFound"
        self.send_response(status)
        for pair in {**head, "Content-Length": str(len(body))}.items():
            self.send_header(*pair)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


def use(monkeypatch, endpoint: str, cache: Path) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(hf_api.api, "endpoint", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@contextmanager
def serving(root: Path) -> Iterator[type[FakeHub]]:
    handler = type("Handler", (FakeHub,), {"root": root, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    handler.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield handler
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[type[FakeHub]]:
    root = tmp_path / "hub"
    (root / "owner").mkdir(parents=True)
    with serving(root) as handler:
        use(monkeypatch, handler.endpoint, tmp_path / "cache")
        yield handler


def closed_port() -> str:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{closed.getsockname()[1]}"


LOADED = {  # everything that comes from the hub
    "diffusion": lambda name: StableDiffusion.examine({"pretrained": name}),
    "lora": lambda name: StableDiffusion("emoji", 1, lora=name, weight_name="a.safetensors"),
    "lora's names": lambda name: StableDiffusion("emoji", 1, lora=name),
    "decoder": lambda name: StableDiffusion("emoji", 1).load_decoder(name),
    "clip": lambda name: CLIPScore(name).load(),
    "open_clip": lambda name: CLIPScore(architecture=f"hf-hub:{name}").load(),
    "classifier": lambda name: Classifier(name, 0).load(),
    "image_reward": lambda name: ImageReward(f"{name}/ImageReward.pt").load(),
}


@pytest.mark.parametrize("what", LOADED)
def test_an_unreachable_hub_is_reported_with_what_to_do(monkeypatch, tmp_path, what):
    endpoint = closed_port()
    use(monkeypatch, endpoint, tmp_path)
    expected = (
        f"owner/name.* cannot be loaded: .*the hub at {endpoint} cannot be reached .*refused.*give a path on this"
    )
    with pytest.raises(UserError, match=expected) as caught:
        LOADED[what]("owner/name")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "the hub has no model of that name, or it is private"),
        ("gated", "its owner restricts access: accept the terms"),
        ("revision", "the hub has the model, but not this revision"),
        ("denied", "the hub refused: .*403.*hf auth login"),
        ("empty", "the hub has the model, but not this file: .*file"),
    ],
)
def test_a_refusal_of_the_hub_is_told_apart(hub, name, message):
    (hub.root / "owner" / "empty").mkdir()
    with pytest.raises(UserError, match=f"'owner/{name}/file.pt' cannot be loaded: {message}") as caught:
        find_file(f"owner/{name}/file.pt")
    assert "\n" not in str(caught.value)


def test_of_a_hub_name_only_the_index_is_read_to_refuse_another_class(hub, sd15):
    folder = Path(shutil.copytree(sd15, hub.root / "owner" / "xl"))
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    with pytest.raises(UserError, match="pretrained='owner/xl' is a StableDiffusionXLPipeline; this class takes"):
        StableDiffusion.examine({"pretrained": "owner/xl"})
    assert [line for line in hub.asked if line.startswith("GET")] == ["GET owner/xl/resolve/main/model_index.json"]


def test_a_model_of_the_hub_equals_its_folder_and_loads_again_without_the_hub(hub, sd15, tmp_path, monkeypatch):
    shutil.copytree(sd15, hub.root / "owner" / "sd15")
    local, ours = StableDiffusion(sd15, 1), StableDiffusion("owner/sd15", 1)
    assert not any("safety_checker" in line or "feature_extractor" in line for line in hub.asked)
    use(monkeypatch, closed_port(), tmp_path / "cache")
    for other in (ours, StableDiffusion("owner/sd15", 1), StableDiffusion("owner/sd15", 1, local_files_only=True)):
        expected = local.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in other.state_dict().items())


def test_a_lora_of_the_hub_is_found_by_its_files(hub, tmp_path, monkeypatch):
    folder = hub.root / "owner" / "lora"
    folder.mkdir()
    (folder / "toy.safetensors").write_bytes(b"toy")
    assert find_lora("owner/lora")[0].read_bytes() == b"toy"
    (folder / "adapter_model.safetensors").write_bytes(b"peft")
    (folder / "adapter_config.json").write_text("{}")
    (found,) = find_lora("owner/lora")
    assert found.read_bytes() == b"peft"
    assert (found.parent / "adapter_config.json").is_file()
    assert find_lora("owner/lora/toy.safetensors")[0].read_bytes() == b"toy"
    use(monkeypatch, closed_port(), tmp_path / "cache")
    assert find_lora("owner/lora") == find_lora("owner/lora", local_files_only=True) == [found]


def test_code_in_a_model_that_open_clip_reads_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what a user might answer
    tower, clip = tmp_path / "tower", tmp_path / "clip"
    for folder in (tower, clip):
        folder.mkdir()
    (tower / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}')
    (tower / "mine.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nMine = None\n")
    text = {"hf_model_name": str(tower), "hf_tokenizer_name": str(tower)}
    model = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8},
        "text_cfg": text,
    }
    (clip / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {}}))
    with pytest.raises(UserError, match=r"of open_clip cannot be loaded: .*code"):
        CLIPScore(architecture=f"local-dir:{clip}").load()
    assert not (tmp_path / "run").exists()


def test_no_call_loads_code_or_pickles():
    """Every call that takes them says `trust_remote_code=False`, or `weights_only=True`."""
    found = {"from_pretrained": [], "download": [], "torch.load": []}
    for path in Path(svdd.__file__).parent.rglob("*.py"):
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            name = name if name in found else name.rpartition(".")[2]
            if name in found:
                wanted = "weights_only=True" if name == "torch.load" else "trust_remote_code=False"
                options = {f"{option.arg}={ast.unparse(option.value)}" for option in call.keywords}
                found[name].append((f"{path.name}:{call.lineno}", wanted in options))
    assert all(found.values())
    assert [place for calls in found.values() for place, safe in calls if not safe] == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (object(), "holds objects that could run code"),
        ({"model": {"x": torch.ones(1)}}, "holds no weights by name"),
        ({1: torch.ones(1)}, "holds no weights by name"),
        ([torch.ones(1)], "holds no weights by name"),
        ({"state_dict": {"x": 1}}, "holds no weights by name"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match=message) as caught:
        read_weights(tmp_path / "a.pt")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_saved_as_a_sentencepiece_model_alone_names_the_package_it_needs(tmp_path, monkeypatch):
    from transformers import T5Tokenizer

    (tmp_path / "spiece.model").write_bytes(b"")
    monkeypatch.setattr("svdd.assets.hub.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^X has its tokens in spiece.model alone, .* pip install 'svdd\[t5\]'$"):
        read_tokenizer(T5Tokenizer, str(tmp_path), "X", None)
