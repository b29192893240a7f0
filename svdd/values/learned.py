"""What every learned value is: a network that is fitted to rollouts of the pretrained chain.

Source: Li et al., 2024, arXiv 2408.08252, Algorithm 3 (SVDD-MC): sample trajectories, regress on the reward of their
ends.
"""

import json
from abc import abstractmethod
from contextlib import nullcontext
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from svdd import UserError
from svdd.diffusion.base import Diffusion
from svdd.runs.files import write_atomically
from svdd.state.state import State
from svdd.values.base import Value
from svdd.values.losses import MeanLoss, ValueLoss

__all__ = ["LearnedValue", "weights_file"]


class LearnedValue(Value):
    """A network's estimate of the value, from the noisy latent (or its x0), the step and the prompt.

    Attributes:
        input: What of a state the network reads: `x` costs no denoiser row, `x0` one.
        decodes: Whether it looks at decoded latents.
    """

    input: str = "x"
    decodes: bool = False
    mean: Tensor
    std: Tensor
    spread: Tensor
    trained: Tensor

    def __init__(
        self, loss: ValueLoss | None = None, learning_rate: float = 1e-3, pretrained: str | None = None
    ) -> None:
        super().__init__()
        if not learning_rate > 0:
            raise ValueError(f"learning_rate must be > 0, got {learning_rate}")
        self.loss = loss if loss is not None else MeanLoss()
        self.learning_rate, self.pretrained = learning_rate, pretrained
        self.identity: dict[str, Any] = {}
        self.register_buffer("trained", torch.tensor(False))

    @abstractmethod
    def build(self, diffusion: Diffusion) -> None:
        """Makes the network for the shapes of this diffusion."""

    @abstractmethod
    def estimate(self, x: Tensor, progress: Tensor, text: Tensor | None) -> Tensor:
        """Returns the estimates in units of the rewards' spread, [n].

        Args:
            x: What `read` returned, of about unit variance.
            progress: i / T of each row, [n].
            text: Features of each row's prompt, [n, d], where the diffusion has any.
        """

    @property
    def most_rows(self) -> int:  # type: ignore[override]
        """None unless it reads x0."""
        return 1 if self.input == "x0" else 0

    @property
    def settings(self) -> dict[str, Any]:
        """What else the meaning of the weights depends on and their shapes do not tell, as plain data."""
        return {}

    @property
    def differentiable(self) -> bool:
        """A network is."""
        return True

    def prepare(self, diffusion: Diffusion) -> None:
        """Builds the network, and loads its weights where `pretrained` names them."""
        steps = diffusion.num_inference_steps
        self.register_buffer("mean", torch.tensor(0.0))
        self.register_buffer("std", torch.tensor(1.0))
        self.register_buffer("spread", torch.ones(steps))  # standard deviation of the inputs at step i
        self.build(diffusion)
        own = {"value": type(self).__name__, "input": self.input, **self.settings}
        self.identity = own | {"reward": self.reward.identity} | diffusion.identity
        if self.pretrained is not None:
            self._load(weights_file(self.pretrained))

    def forward(self, state: State) -> Tensor:
        """Returns one estimate per row, float32 [n]; at the end of the chain the reward itself.

        Raises:
            UserError: If the value was not trained, or an estimate is not a finite number.
        """
        if state.done:
            return state.scores(self.reward)
        if not self.trained:
            raise UserError(
                f"{type(self).__name__} is not trained yet: run `svdd fit` first and give its checkpoint as "
                "--ckpt_path, or weights as --model.value.pretrained"
            )
        context = state.context
        features = context.diffusion.prompt_features(context.conditioning)
        text = None if features is None else features[state.row]
        x = self.read(state)
        step = torch.full_like(state.row, state.i)
        rows = (x, step) if text is None else (x, step, text)
        with context.ledger.timed("decoder_seconds", x.device) if self.decodes else nullcontext():
            values = context.diffusion.chunker.map(self.predict, len(x), *rows)
        context.ledger.decoded_images += len(x) if self.decodes else 0
        if not torch.isfinite(values).all():
            raise UserError(
                f"{type(self).__name__} returned NaN or infinity at step {state.i}: its training may have diverged; "
                "look at its logs, and train again with a lower learning_rate"
            )
        return values

    def read(self, state: State) -> Tensor:
        """Returns what the network is shown of a state, [n, c, h, w]."""
        return state.x0 if self.input == "x0" else state.x

    def predict(self, x: Tensor, step: Tensor, text: Tensor | None = None) -> Tensor:
        """Returns estimates in units of the reward, float32 [n].

        Args:
            x: What `read` returned.
            step: Step index of each row, int64 [n], 1 .. T - 1.
            text: Features of each row's prompt, [n, d].
        """
        return self.mean.float() + self.std.float() * self.standard(x, step, text).float()

    def standard(self, x: Tensor, step: Tensor, text: Tensor | None = None) -> Tensor:
        """Returns estimates in units of the rewards' spread about their mean, [n]; arguments as in `predict`."""
        dtype = next(self.parameters()).dtype
        spread = self.spread[step].view(-1, 1, 1, 1)
        progress = step.to(self.spread) / len(self.spread)
        return self.estimate((x / spread).to(dtype), progress.to(dtype), None if text is None else text.to(dtype))

    def observe(self, rewards: Tensor, spread: Tensor) -> None:
        """Sets the units: mean and spread of the rewards, and of the inputs at every step.

        Args:
            rewards: The rewards of the rollouts, [n].
            spread: Standard deviation of the inputs at step i, [T].

        Raises:
            UserError: If all rewards are the same.
        """
        std = rewards.double().std()
        if len(rewards) < 2 or not std > 0:
            raise UserError(
                f"the rewards of {len(rewards)} rollouts do not differ, so there is nothing to learn; "
                "use more rollouts or another reward"
            )
        self.mean.copy_(rewards.double().mean())
        self.std.copy_(std)
        self.spread.copy_(spread)
        self.trained.fill_(True)

    def check_identity(self, recorded: dict[str, Any], source: str) -> None:
        """Raises UserError, with every difference, where weights were made for something else.

        Args:
            recorded: The `identity` that the weights were saved with.
            source: Where they come from, for the message.
        """
        own = json.loads(json.dumps(self.identity))
        differences = [
            f"{key} was {recorded.get(key)!r}, here it is {own.get(key)!r}"
            for key in dict.fromkeys((*recorded, *own))
            if recorded.get(key) != own.get(key)
        ]
        if differences:
            raise UserError(f"{source} was trained for something else: {'; '.join(differences)}")

    def export(self, path: Path) -> None:
        """Writes the weights as one safetensors file, half precision where they are not the units."""
        small = {
            name: tensor.half() if tensor.is_floating_point() and tensor.ndim > 1 else tensor
            for name, tensor in self.own_state().items()
        }
        data = save(
            {name: tensor.contiguous().cpu() for name, tensor in small.items()},
            metadata={"identity": json.dumps(self.identity)},
        )
        write_atomically(path, data)

    def own_state(self) -> dict[str, Tensor]:
        """Returns what training determines, by name; weights of a frozen feature extractor are not among it."""
        return dict(self.state_dict())

    def adopt(self, state: dict[str, Tensor], source: str) -> None:
        """Loads what `own_state` returned.

        Raises:
            UserError: If names or shapes do not fit.
        """
        own = self.own_state()
        wrong = [name for name in own.keys() | state if own.get(name, ...) is ... or name not in state]
        wrong += [name for name in own.keys() & state if own[name].shape != state[name].shape]
        if wrong:
            raise UserError(
                f"{source} does not fit {type(self).__name__}: {', '.join(sorted(wrong)[:3])} "
                f"{'differs' if len(wrong) == 1 else 'differ'}; give the arguments that it was trained with"
            )
        self.load_state_dict({name: tensor.to(own[name].dtype) for name, tensor in state.items()}, strict=False)

    def _load(self, path: Path) -> None:
        source = f"pretrained={self.pretrained!r}"
        try:
            with safe_open(path, framework="pt") as file:
                recorded = json.loads((file.metadata() or {}).get("identity", "{}"))
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise UserError(f"{source} cannot be loaded: {error}; expected a file that `svdd fit` wrote") from error
        self.check_identity(recorded, source)
        self.adopt(state, source)


def weights_file(pretrained: str) -> Path:
    """Returns where the weights are that `pretrained` names: those that ship with svdd, or a file."""
    built_in = Path(str(files("svdd") / "assets" / "values" / f"{pretrained}.safetensors"))
    return built_in if built_in.is_file() else Path(pretrained).expanduser()
