"""`svdd app`: a page in the browser that draws unguided and guided pictures side by side."""

import os
from importlib.util import find_spec

from svdd import UserError, say
from svdd.commands.options import Options

__all__ = ["app"]

_PASSWORD = "SVDD_APP_PASSWORD"


def app(words: list[str]) -> None:
    """Runs `svdd app` with the command line after its name, until a signal comes.

    Raises:
        UserError: If a setting or the model cannot be used, or nothing can listen at the address.
    """
    parser = Options("svdd app", "A page in the browser: unguided beside guided pictures of one prompt.")
    config = "YAML file of `svdd predict`, or the name of one that ships with svdd (default: quickstart)"
    parser.add_argument("--config", default="quickstart", metavar="NAME|FILE", help=config)
    pretrained = "another model: a folder, a hub name or a .safetensors file"
    parser.add_argument("--pretrained", metavar="NAME", help=pretrained)
    reward = "another reward that guides, such as 'CLIPScore(pretrained=openai/clip-vit-base-patch32)'"
    parser.add_argument("--reward", metavar="REWARD", help=reward)
    names = "rewards that visitors may name, separated by commas (default: all of `svdd list reward`)"
    parser.add_argument("--rewards", default="", metavar="NAMES", help=names)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    rows = "the most denoiser rows that one job may cost (default: 20000)"
    parser.add_argument("--max_rows", type=int, default=20_000, metavar="N", help=rows)
    parser.add_flag("--downloads", "whether visitors' rewards may be downloaded from the hub (default: false)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen at, 0 for any (default: 7860)")
    given = parser.parse_args(parser.spelled_out(words))
    if given.max_rows < 1:
        raise UserError(f"--max_rows must be >= 1, got {given.max_rows}")
    if find_spec("gradio") is None:
        raise UserError("svdd app needs gradio: pip install 'svdd[app]'")
    from svdd.commands.app.server import LOCAL, listen, private_folder, serve

    password = os.environ.get(_PASSWORD) or None
    opened = listen(given.host, given.port)
    with private_folder(), opened:  # before gradio is imported
        from huggingface_hub import constants

        from svdd.commands.app.engine import Engine
        from svdd.commands.app.page import CSS, THEME, build
        from svdd.commands.app.template import Template
        from svdd.runs.processes.devices import named_device

        chosen = [name.strip() for name in given.rewards.split(",") if name.strip()]
        template = Template(given.config, given.pretrained, given.reward, chosen)
        with Engine(named_device(given.device), given.max_rows) as engine:
            scale = engine.open(template.wanted(template.first()))
            if not given.downloads:
                constants.HF_HUB_OFFLINE = True
            page = build(template, engine, scale)
            is_local = given.host in LOCAL
            host, port = (f"[{given.host}]" if ":" in given.host else given.host), opened.getsockname()[1]
            if not is_local:
                asks = "who knows the password" if password else f"({_PASSWORD} in the environment asks for a password)"
                say(f"svdd: warning: everyone who can reach this machine can use the page {asks}", error=True)
            opened.listen()
            say(f"svdd app: http://{host}:{port} (Ctrl-C ends it)")
            serve(page, opened, LOCAL if is_local else (), password, theme=THEME, css=CSS)
