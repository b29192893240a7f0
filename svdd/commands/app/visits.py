"""What happens on the page: each visitor begins, watches and stops a job of their own."""

import threading
from collections.abc import Iterator
from typing import Any

import gradio as gr

from svdd import UserError, first_line, say
from svdd.commands.app.controls import controls_of, named_class
from svdd.commands.app.engine import Drawn, Engine, Progress, Stopped
from svdd.commands.app.template import Form, Template
from svdd.commands.app.views import LATER, costs, message, pictures, plot, progress, rewards
from svdd.runs.secrets import redact

__all__ = ["Visits"]

_SAME = gr.skip()
_READY = [gr.update(interactive=True), gr.update(interactive=False)]  # the buttons Draw and Stop


class Visits:
    """The jobs that are drawn or wait, at most one for each visitor, who can stop only that one.

    The methods return or yield the outputs of the page, in the order in which `page.build` lists them.
    """

    def __init__(self, template: Template, engine: Engine) -> None:
        self._template, self._engine = template, engine
        self._accelerator = {"cuda": "gpu"}.get(engine.device.type, engine.device.type)
        self._stops: dict[str | None, threading.Event] = {}  # by session

    def begin(self, request: gr.Request) -> list[Any]:
        """Notes a new job, which then waits for the jobs before it."""
        if self._stops.setdefault(request.session_hash, fresh := threading.Event()) is not fresh:
            raise gr.Error("your last job waits or is drawn; stop it first", print_exception=False)
        waits = message("Waiting for the jobs before this one.")
        return [waits, gr.update(interactive=False), gr.update(interactive=True)]

    def stop(self, request: gr.Request) -> str:
        """Stops the visitor's job."""
        self.leave(request)
        return message("Stopping.")

    def leave(self, request: gr.Request) -> None:
        """Stops a visitor's job when the page is closed."""
        if (stop := self._stops.get(request.session_hash)) is not None:
            stop.set()

    def end(self, request: gr.Request) -> list[Any]:
        """Forgets a job that was refused, as the queue is full."""
        self._stops.pop(request.session_hash, None)
        return _READY

    def draw(self, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        """Yields where the visitor's job is, and its pictures."""
        running, ready = [_SAME] * 2, _READY
        drawn: dict[bool, Drawn] = {}
        try:
            if (stop := self._stops.get(request.session_hash)) is None:
                raise UserError("this job was not begun with Draw; reload the page")
            wanted = self._template.wanted(_read(self._template, values))
            copied = [wanted.command(self._accelerator), wanted.yaml()]
            yield [message("Loading."), "", LATER, "", LATER, *copied, *running]
            for update in self._engine.draw(wanted, stop):
                if isinstance(update, Progress):
                    shown = pictures(drawn.get(False), None, update)
                    yield [progress(update), shown, *[_SAME] * 5, *running]
                else:
                    drawn[update.guided] = update
            plain, guided = drawn[False], drawn[True]
            said = f"Done in {plain.seconds + guided.seconds:.1f} s."
            shown = pictures(plain, guided)
            yield [message(said), shown, rewards(plain, guided), costs(plain, guided), plot(guided), *copied, *ready]
        except Stopped:
            yield [message("Stopped."), *[_SAME] * 6, *ready]
        except UserError as error:
            yield [message(redact(str(error)), is_error=True), *[_SAME] * 6, *ready]
        except Exception as error:
            say(f"svdd: error: {type(error).__name__}: {redact(first_line(error))}", error=True)
            yield [message(f"The job failed: {type(error).__name__}.", is_error=True), *[_SAME] * 6, *ready]
        finally:
            self._stops.pop(request.session_hash, None)


def _read(template: Template, values: tuple[Any, ...]) -> Form:
    """Returns the form from one value for each component; only the controls of the chosen classes count."""
    given = list(values)
    prompt, negative, reward, held_out = given[:4]
    sampler, sampler_arguments, rest = _chosen(template, "sampler", given[4:])
    value, value_arguments, numbers = _chosen(template, "value", rest)
    return Form(prompt, negative, reward, held_out, sampler, sampler_arguments, value, value_arguments, *numbers)


def _chosen(template: Template, kind: str, given: list[Any]) -> tuple[Any, list[Any], list[Any]]:
    """Returns a class's name, the values of its controls, and what follows the controls of all classes."""
    counts = {name: len(controls_of(named_class(kind, name))) for name in template.choices[kind]}
    chosen, start = given[0], 1
    own: list[Any] = []
    for name, count in counts.items():
        own = given[start : start + count] if name == chosen else own
        start += count
    return chosen, own, given[start:]
