"""The page: its controls, and where the results are shown."""

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import gradio as gr

from svdd.commands.app.controls import Control, controls_of, named_class
from svdd.commands.app.engine import Engine
from svdd.commands.app.template import MAX_IMAGES, Template
from svdd.commands.app.views import LATER, message
from svdd.commands.app.visits import Visits
from svdd.commands.registry import catalogue

__all__ = ["CSS", "THEME", "build"]

CSS = files("svdd.commands.app").joinpath("page.css").read_text(encoding="utf-8")
_SANS, _MONO = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")
THEME = gr.themes.Default(font=_SANS, font_mono=_MONO)  # fonts of the visitor's machine
_QUEUE = 16  # jobs that may wait
_EXAMPLES = ("CLIPScore", "Brightness", "Colorfulness", "Compressibility", "Incompressibility", "Sharpness")


def build(template: Template, engine: Engine, guidance_scale: float | None) -> gr.Blocks:
    """Returns the page of a configuration whose model has this scale of classifier-free guidance."""
    visits = Visits(template, engine)
    with gr.Blocks(title="svdd", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown("# svdd\nOne prompt, one random seed: unguided beside guided by a reward.")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                form = _form(template, guidance_scale)
                with gr.Row():
                    draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=100)
                    stop = gr.Button("Stop", elem_id="stop", interactive=False, min_width=100)
            with gr.Column(scale=3, min_width=320):
                status = _html(message("Ready."), "status")
                shown = _html("", "pictures")
                with gr.Accordion("Rewards and cost", open=True):
                    table, cost = _html(LATER, "rewards"), _html("", "cost")
                with gr.Accordion("Values and effective sample size", open=True):
                    chart = _html(LATER, "plot")
                with gr.Accordion("The same pictures with svdd predict", open=True):
                    command = _copied("Command", "command")
                    yaml = _copied("YAML", "yaml")
        with gr.Accordion("All rewards", open=False):
            gr.Markdown(_described(template))
        outputs = [status, shown, table, cost, chart, command, yaml, draw, stop]
        quick: Any = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
        begun = draw.click(visits.begin, None, [status, draw, stop], **quick)
        slow: Any = {"concurrency_limit": 1, "api_visibility": "private", "show_progress": "minimal"}
        slow |= {"preprocess": False, "show_progress_on": status}  # values are checked by `Template.wanted`
        drawn = begun.success(visits.draw, form, outputs, **slow)
        drawn.failure(visits.end, None, [draw, stop], **quick)
        stop.click(visits.stop, None, status, **quick)
        page.unload(visits.leave)
    page.state_session_capacity = 2 * _QUEUE  # gradio keeps the last outputs of so many visitors
    return page.queue(max_size=_QUEUE, api_open=False)


def _form(template: Template, guidance_scale: float | None) -> list[Any]:
    """Returns the components whose values `_read` turns into a `Form`, in its order."""
    first = template.first()
    prompt = gr.Textbox(first.prompt, label="Prompt", max_length=1000, elem_id="prompt")
    known = [name for name in _EXAMPLES if name in template.rewards and name != first.reward]
    reward = gr.Dropdown(
        [first.reward, *known],
        value=first.reward,
        label="Reward that guides",
        info="A name, or a sum such as CLIPScore + 0.1 * Brightness",
        allow_custom_value=True,
        elem_id="reward",
    )
    sampler, sampler_arguments = _chooser(template, "sampler", first.sampler_arguments)
    hint = "Denoiser rows an image, from which the sampler's count follows. 0: the count in its arguments"
    budget = _number("Budget", first.budget or 0, info=hint)
    with gr.Row():
        steps = _number("Steps", first.num_inference_steps)
        scale = gr.Number(
            guidance_scale, label="Guidance scale", minimum=0, step=0.5, min_width=80, elem_id="guidance-scale"
        )
    with gr.Row():
        seed, images = _number("Seed", first.seed), _number("Images", first.images, maximum=MAX_IMAGES)
    with gr.Accordion("Negative prompt, held-out rewards, value", open=False):
        negative = gr.Textbox(first.negative_prompt, label="Negative prompt", max_length=1000)
        hint = "One a line. They are measured and never guide"
        held_out = gr.Textbox(first.held_out, label="Held-out rewards", info=hint, lines=2)
        value, value_arguments = _chooser(template, "value", first.value_arguments)
    parts = [prompt, negative, reward, held_out, sampler, *sampler_arguments, value, *value_arguments]
    return [*parts, scale, steps, seed, images, budget]


def _number(label: str, value: int | None, **more: Any) -> gr.Number:
    """Returns a control of a whole number."""
    return gr.Number(value, label=label, precision=0, minimum=0, min_width=80, elem_id=label.lower(), **more)


def _chooser(template: Template, kind: str, configured: Sequence[Any]) -> tuple[gr.Dropdown, list[Any]]:
    """Returns a choice of classes, and the controls of all of them; those of the chosen class are visible."""
    names, own = template.choices[kind], template.class_of(kind)
    descriptions = {entry.name: entry.description for entry in catalogue() if entry.kind == kind}
    chosen = gr.Dropdown(names, value=own, label=kind.capitalize(), info=descriptions[own], elem_id=kind)
    groups, components = [], []
    for name in names:
        with gr.Accordion(f"Arguments of {name}", open=False, visible=name == own, elem_id=f"{kind}-{name}") as group:
            controls = controls_of(named_class(kind, name))
            values = configured if name == own else [control.default for control in controls]
            components += [_component(*pair) for pair in zip(controls, values, strict=True)]
        groups.append(group)

    def show(name: str) -> list[Any]:
        return [gr.update(info=descriptions.get(name, "")), *(gr.update(visible=name == each) for each in names)]

    chosen.change(show, chosen, [chosen, *groups], queue=False, api_visibility="private", show_progress="hidden")
    return chosen, components


def _component(control: Control, value: Any) -> Any:
    shown: dict[str, Any] = {"label": control.name, "info": control.help}
    if control.kind == "switch":
        return gr.Checkbox(value, **shown)
    if control.kind == "choice":
        return gr.Dropdown(list(control.choices), value=value, **shown)
    if control.kind == "text":
        return gr.Textbox(str(value), **shown)
    whole = {"precision": 0} if control.kind == "integer" else {"step": 0.05}
    return gr.Number(None if isinstance(value, list | dict) else value, **whole, **shown)


def _html(value: str, name: str) -> gr.HTML:
    return gr.HTML(value, elem_id=name, apply_default_css=False)


def _copied(label: str, name: str) -> gr.Textbox:
    names: Any = {"elem_id": name, "elem_classes": "svdd-copied"}
    return gr.Textbox(label=label, lines=3, max_lines=12, interactive=False, buttons=["copy"], **names)


def _described(template: Template) -> str:
    listed = [entry for entry in catalogue() if entry.kind == "reward" and entry.name in template.rewards]
    rows = "\n".join(f"| {entry.name} | {entry.description.replace('|', '/')} |" for entry in listed)
    return f"Some need weights that must be on the machine of the page.\n\n| reward | |\n|---|---|\n{rows}"
