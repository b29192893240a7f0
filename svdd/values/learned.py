"""Networks that are fitted to rollouts, and their files: SVDD-MC of Li et al., 2024, arXiv 2408.08252, Algorithm 3."""

import inspect
import json
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from svdd import UserError, require_numbers
from svdd.diffusion.base import Diffusion, per_row
from svdd.rewards.base import Reward, sparing
from svdd.state.state import State
from svdd.values.base import Value
from svdd.values.losses import MeanLoss, ValueLoss

__all__ = [
    "HEADER",
    "LearnedValue",
    "read_checkpoint",
    "require_dropout",
    "require_single_score",
    "to_safetensors",
    "weights_file",
]

_WEIGHTS = ("weights", "weights_bfloat16")  # digests of one model's weights, which agree if one of them does
HEADER = "svdd_value"  # the entry, in both kinds of file, with the value's `identity` and `arguments`
_EXPECTED = "expected value.safetensors, best.ckpt or last.ckpt as written by `svdd fit`"


class LearnedValue(Value):
    """A network that predicts the value from the noisy latent (or its x0), the step and the prompt.

    A subclass implements `build` and `network_output`, and keeps each constructor argument as an attribute of the same
    name: weights files carry those that are plain data. `LatentConvValue` explains the arguments of this class.

    Attributes:
        input: What the network reads of a state: `x` costs no denoiser row, `x0` one.
        decodes: Whether it decodes latents, which are then not rescaled.
        frozen: Prefixes of the names of weights that training does not change, such as a feature extractor's.
        exact: Prefixes of the names of buffers that keep float32 in a half-precision value.
        settings: What else determines the meaning of the weights beyond their shapes, as plain data; set by `build`.
        identity: What the weights are valid for, as plain data; set by `bind`.
    """

    differentiable = True
    input: str = "x"
    decodes: bool = False
    frozen: tuple[str, ...] = ()
    exact: tuple[str, ...] = ("mean", "std", "spread")
    mean: Tensor
    std: Tensor
    spread: Tensor
    trained: Tensor

    def __init__(
        self, loss: ValueLoss | None = None, learning_rate: float = 1e-3, pretrained: str | None = None
    ) -> None:
        super().__init__()
        require_numbers(learning_rate=learning_rate)
        if not learning_rate > 0:
            raise ValueError(f"learning_rate must be > 0, got {learning_rate}")
        self.loss, self.learning_rate, self.pretrained = loss or MeanLoss(), learning_rate, pretrained
        self.settings: dict[str, Any] = {}
        self.identity: dict[str, Any] = {}
        self.register_buffer("trained", torch.tensor(False))

    @abstractmethod
    def build(self, diffusion: Diffusion) -> None:
        """Creates the network for the shapes of this diffusion model; the random generator is seeded."""

    @abstractmethod
    def network_output(self, x: Tensor, progress: Tensor, text: Tensor | None) -> Tensor:
        """Returns predictions in units of the rewards' spread about their mean, [n].

        Args:
            x: The inputs, divided by their spread at that step, [n, *latent_shape].
            progress: i / T of each row, [n].
            text: Features of each row's prompt, [n, d]; None if the diffusion model has none.
        """

    def prompt_features(self, diffusion: Diffusion, conditioning: Any, prompts: Sequence[str]) -> Tensor | None:
        """Returns the features of the encoded prompts that the network reads, [p, d], by default the text encoder's."""
        return diffusion.prompt_features(conditioning)

    @property
    def arguments(self) -> dict[str, Any]:
        """The constructor arguments that are plain data, without those of the training."""
        base, own = (inspect.signature(cls).parameters for cls in (LearnedValue, type(self)))
        found = {name: getattr(self, name, ...) for name in own if name not in base}
        return {name: value for name, value in found.items() if isinstance(value, int | float | str | list | None)}

    def bind(self, reward: Reward, diffusion: Diffusion) -> None:
        """Sets the reward, builds the network, and loads the weights: its own if it is trained, or `pretrained`."""
        super().bind(reward, diffusion)
        require_single_score(type(self).__name__, reward)
        checkpoint, source = self.checkpoint() if self.trained else None, "this value"
        if checkpoint is None and self.pretrained is not None:
            checkpoint, source = read_checkpoint(self.pretrained), f"pretrained={self.pretrained!r}"
        for name, recorded in (checkpoint[HEADER]["arguments"] if checkpoint else {}).items():
            if name in self.arguments and getattr(self, name) == inspect.signature(type(self)).parameters[name].default:
                setattr(self, name, recorded)
        self.register_buffer("mean", torch.tensor(0.0))
        self.register_buffer("std", torch.tensor(1.0))
        self.register_buffer("spread", torch.ones(diffusion.num_inference_steps))  # std of the inputs at step i
        with torch.random.fork_rng(devices=[]):  # the same initial weights in every process
            torch.manual_seed(0)
            self.build(diffusion)
        self.most_rows = 1 if self.input == "x0" else 0
        own = {"value": type(self).__name__, "input": self.input, **self.settings}
        self.identity = own | {"reward": reward.identity} | diffusion.identity
        if hasattr(diffusion, _WEIGHTS[1]):
            self.identity[_WEIGHTS[1]] = diffusion.weights_bfloat16
        if checkpoint is not None:
            self.load_checkpoint(checkpoint, source)

    def estimate(self, state: State) -> Tensor:
        """Returns one prediction per row, float32 [n]; UserError if it is not finite, or the value is not trained."""
        name, context = type(self).__name__, state.context
        if not self.trained:
            raise UserError(f"{name} is not trained yet: run `svdd fit` first, and set --model.value.pretrained FILE")
        features = self.prompt_features(context.diffusion, context.conditioning, context.prompts)
        x, step = getattr(state, self.input), torch.full_like(state.row, state.i)
        rows = (x, step) if features is None else (x, step, features[state.row])
        with context.ledger.timed("decoder_seconds", x.device) if self.decodes else nullcontext():
            predictions = context.diffusion.chunker.map(self.predict, state.num_images, *rows, work=("value", self))
        values = self.mean + self.std * predictions.float()
        context.ledger.decoded_images += len(x) if self.decodes else 0
        if not torch.isfinite(values).all():
            context.finiteness.settle()  # what the value reads may have failed before
            raise UserError(
                f"{name} returned NaN or infinity at step {state.i}: its training may have diverged; check the "
                "training logs, and train again with a lower learning_rate; --trainer.precision 16-true may overflow"
            )
        return values

    def predict(self, x: Tensor, step: Tensor, text: Tensor | None = None) -> Tensor:
        """Returns predictions as `network_output` does, for `state.x` or `state.x0` at the steps, int64 [n]."""
        dtype = next(each.dtype for name, each in self.named_parameters() if not name.startswith(self.frozen))
        progress = step.to(self.spread) / len(self.spread)
        x = (x / per_row(self.spread[step], x)).to(dtype)
        return self.network_output(x, progress.to(dtype), None if text is None else text.to(dtype))

    def set_units(self, rewards: Tensor, spread: Tensor) -> None:
        """Sets the units, a part of the weights, from rewards [n] and the inputs' spread [T]."""
        std = rewards.double().std()
        if len(rewards) < 2 or not std > 0:
            raise UserError(f"the rewards of {len(rewards)} rollouts do not differ: use more, or another reward")
        self.mean.copy_(rewards.double().mean())
        self.std.copy_(std)
        self.spread.copy_(torch.ones_like(spread) if self.decodes else spread)
        self.trained.fill_(True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LearnedValue":
        """Moves and converts the network, but does not cast what is `exact`."""
        return super()._apply(
            sparing((b for name, b in self.named_buffers() if name.startswith(self.exact)), fn), recurse
        )

    def checkpoint(self) -> dict[str, Any]:
        """Returns what a file needs to restore the value, as the entries of a Lightning checkpoint."""
        state = {f"value.{k}": tensor for k, tensor in self.state_dict().items() if not k.startswith(self.frozen)}
        return {"state_dict": state, HEADER: {"identity": self.identity, "arguments": self.arguments}}

    def load_checkpoint(self, checkpoint: dict[str, Any], source: str) -> None:
        """Loads a checkpoint; UserError, which names the source, if it is for something else or has other shapes."""
        recorded, state, own = _header(checkpoint, source), checkpoint["state_dict"], self.checkpoint()["state_dict"]
        if differences := _differences(recorded["identity"], json.loads(json.dumps(self.identity))):
            raise UserError(f"{source} was trained for something else: {'; '.join(differences)}")
        shapes, expected = ({k: list(tensor.shape) for k, tensor in tensors.items()} for tensors in (state, own))
        if wrong := _differences(shapes, expected):
            causes = _differences(recorded["arguments"], self.arguments) or wrong[:1]
            raise UserError(f"{source} does not fit {type(self).__name__}: {'; '.join(causes)}")
        self.load_state_dict({k.removeprefix("value."): v.to(own[k].dtype) for k, v in state.items()}, strict=False)


def weights_file(pretrained: str) -> Path:
    """Returns the file that `pretrained` names: one that ships with svdd, or a path."""
    built_in = Path(str(files("svdd") / "assets" / "values" / f"{pretrained}.safetensors"))
    return built_in if built_in.is_file() else Path(pretrained).expanduser()


def require_single_score(name: str, reward: Reward) -> None:
    """Raises UserError for a groupwise reward, which is no number of a single rollout."""
    if getattr(reward, "groupwise", False):
        raise UserError(
            f"{name} needs the reward of a single rollout, and {reward.name} scores an image relative to those scored "
            "with it; use another reward, or guide by it with PosteriorMean, Lookahead or Screened"
        )


def require_dropout(dropout: float) -> None:
    """Raises ValueError for a rate that is no number at least 0 and below 1."""
    require_numbers(dropout=dropout)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")


def read_checkpoint(pretrained: str) -> dict[str, Any]:
    """Reads a file of `svdd fit` as data; UserError if it cannot be read or is another kind of file."""
    source, path = f"pretrained={pretrained!r}", weights_file(pretrained)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{source} is no regular file; expected a file of `svdd fit`")
    try:
        with open(path, "rb") as opened:
            if path.suffix != ".safetensors":
                checkpoint = torch.load(opened, "cpu", weights_only=True)
            else:
                with safe_open(path, "pt") as file:
                    checkpoint = {HEADER: json.loads((file.metadata() or {}).get(HEADER, "null"))}
                    checkpoint["state_dict"] = {f"value.{k}": file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror or error}; {_EXPECTED}") from error
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{source} is not a weights file, or a damaged one; {_EXPECTED}") from error
    _header(checkpoint, source)
    return checkpoint


def to_safetensors(checkpoint: dict[str, Any]) -> bytes:
    """Encodes a value's checkpoint as a safetensors file; matrices in half precision."""
    state = {k.removeprefix("value."): v.contiguous().cpu() for k, v in checkpoint["state_dict"].items()}
    small = {k: v.half() if v.is_floating_point() and v.ndim > 1 else v for k, v in state.items()}
    return save(small, {HEADER: json.dumps(checkpoint[HEADER])})


def _header(checkpoint: Any, source: str) -> dict[str, Any]:
    """Returns `identity` and `arguments` of the value in a checkpoint; UserError if it holds none."""
    found, state = (checkpoint.get(k) if isinstance(checkpoint, dict) else None for k in (HEADER, "state_dict"))
    if not isinstance(found, dict) or found.keys() != {"identity", "arguments"}:
        raise UserError(f"{source} holds no value of svdd; {_EXPECTED}")
    whole = isinstance(state, dict) and all(isinstance(tensor, Tensor) for tensor in state.values())
    if not (whole and all(isinstance(part, dict) for part in found.values()) and "value" in found["identity"]):
        raise UserError(f"{source} holds a damaged value of svdd; {_EXPECTED}")
    return found


def _differences(recorded: dict[str, Any], own: dict[str, Any]) -> list[str]:
    same = any(recorded.get(key) == own.get(key) is not None for key in _WEIGHTS)
    return [
        f"{key} was {recorded.get(key)!r}, here it is {own.get(key)!r}"
        for key in dict.fromkeys((*recorded, *own))
        if recorded.get(key) != own.get(key) and not (key in _WEIGHTS and (same or key != _WEIGHTS[0]))
    ]
