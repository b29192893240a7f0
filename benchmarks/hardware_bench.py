"""What benchmarks/hardware.py measures: rows of network and decoder, guided sampling, compiled calls."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.clock import Clock
from benchmarks.plain_loops import Calls, PlainLoops, network_of
from benchmarks.shapes import Shape, diffusion, leaves
from svdd import first_line, is_out_of_memory
from svdd.diffusion.latent import LatentDiffusion
from svdd.diffusion.memory import PeakMemory, release_memory
from svdd.guided_diffusion import GuidedDiffusion
from svdd.rewards.base import Reward
from svdd.rewards.brightness import Brightness
from svdd.rewards.jpeg import Compressibility
from svdd.samplers.base import Sampler
from svdd.samplers.best_of_n import BestOfN
from svdd.samplers.smc import SMC
from svdd.samplers.svdd import SVDD

__all__ = ["Bench"]

PROMPT = "red apple"
ROWS_SHARE, LONG = 0.4, 2.0  # of the whole time, for rows; seconds from which a call is measured once
STEPS = (50, 28, 20, 10, 5, 3, 2)
MAKERS: dict[str, Callable[[int], Sampler]] = {"SVDD": SVDD, "BestOfN": BestOfN, "SMC": SMC}
JOBS: Sequence[tuple[str, tuple[int, ...], type[Reward]]] = (  # the first size that fits is drawn
    ("SVDD", (8, 4, 2), Compressibility),
    ("BestOfN", (8, 4, 2), Compressibility),
    ("SVDD", (20,), Compressibility),
    ("SMC", (8, 4, 2), Compressibility),
    ("SVDD", (8, 4, 2), Brightness),
)


class Bench:
    """Measurements of one pipeline on one device.

    Args:
        pipe: The pipeline.
        shape: Its name and size.
        device: Where it is.
        clock: The time.
        most_rows: Of a call of the network or the decoder.
        compiles: Whether to compile.
    """

    def __init__(
        self,
        pipe: Any,
        shape: Shape,
        device: torch.device,
        clock: Clock,
        most_rows: int = 64,
        compiles: bool = True,
    ) -> None:
        self.pipe, self.shape, self.device, self.clock, self.compiles = pipe, shape, device, clock, compiles
        self.most_rows, self._taken = most_rows, math.inf
        self.rows: list[dict[str, Any]] = []
        self.runs: list[dict[str, Any]] = []
        self.cost: dict[str, float] = {}  # seconds of one row, alone, and of a row in the best measured call
        self.compile_seconds: dict[str, float] = {}

    def chain(self, steps: int = 2, reset: bool = True, **options: Any) -> LatentDiffusion:
        """Returns the chain, after putting the weights of convolutions back into the pipeline's own order."""
        for part in (network_of(self.pipe), self.pipe.vae) if reset else ():
            for layer in (layer for layer in part.modules() if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)):
                layer.to(memory_format=torch.contiguous_format)
        size = {} if self.shape.emoji else {"height": self.shape.pixels, "width": self.shape.pixels}
        return diffusion(self.pipe, self.device, num_inference_steps=steps, **size, **options)

    def synchronise(self) -> None:
        """Waits for the device."""
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize()

    def timed(self, function: Callable[[], Any]) -> float:
        """Returns the seconds of one call."""
        self.synchronise()
        start = time.perf_counter()
        function()
        self.synchronise()
        return time.perf_counter() - start

    def median(self, function: Callable[[], Any]) -> float:
        """Returns the median of up to five calls after the first, or the first if it takes long."""
        first = self.timed(function)
        if first > LONG:
            return first
        return statistics.median(self.timed(function) for _ in range(5 if first < LONG / 5 else 2))

    @torch.no_grad()
    def call(self, chain: LatentDiffusion, part: str, n: int) -> Callable[[], None]:
        """Returns a call of the network or the decoder on n rows; guided rows of the network are two rows of it."""
        x = torch.randn(n, *chain.latent_shape, device=self.device, dtype=chain.dtype)
        if part == "decoder":
            return lambda: self.require_finite(chain.decode(x))
        texts, row = chain.encode([PROMPT], [None]), torch.zeros(n, dtype=torch.int64, device=self.device)
        return lambda: self.require_finite(chain.denoise(x, 0, texts, row).x0)

    def require_finite(self, found: Tensor) -> None:
        """Raises ValueError if random weights gave numbers that are not finite, whose time would mislead."""
        if not bool(found.isfinite().all()):
            raise ValueError(f"the numbers of {self.shape.name} with random weights are not finite")

    def measure(self, part: str, n: int, mode: str, chain: LatentDiffusion) -> float | None:
        """Times n rows and keeps the result; None if memory ran out."""
        record: dict[str, Any] = {"part": part, "rows": n, "mode": mode}
        memory = self.fresh_memory()
        try:
            with torch.inference_mode():
                record["seconds"] = self.median(self.call(chain, part, n))
            record |= self.taken(memory)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            record["error"] = "out of memory"
        self.rows.append(record)
        return record.get("seconds")

    def fresh_memory(self) -> PeakMemory:
        """Returns a meter of memory, after what a large call or a failed one may have left is freed."""
        if self._taken > 2**28:
            release_memory(self.device)
        self._taken = math.inf
        return PeakMemory(self.device)

    def taken(self, memory: PeakMemory) -> dict[str, float]:
        """Returns the most memory since the meter was made, in GiB, where it is known."""
        if not memory.resets or (peak := memory.peak()) is None or memory.before is None:
            return {}
        self._taken = max(0, peak - memory.before)
        return {"gib": self._taken / 2**30}

    def measure_rows(self) -> None:
        """Times both parts by rows, as the pipeline has its weights and as svdd orders them, in turns."""
        chain, until = self.chain(parity=True), ROWS_SHARE * self.clock.total
        open_parts, n = {"network", "decoder"}, 1
        for part in ("network", "decoder"):
            try:
                with torch.inference_mode():
                    self.cost[part] = self.timed(self.call(chain, part, 1))  # also a warm-up
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self.rows.append({"part": part, "rows": 1, "mode": "parity", "error": "out of memory"})
                self.cost[part] = self.cost[f"{part} alone"] = math.inf
                open_parts.discard(part)
        while open_parts and n <= self.most_rows:
            for part in sorted(open_parts):
                expected, what = 2 * n * self.cost[part] * (6 if n * self.cost[part] < LONG else 1), f"{part}, {n} rows"
                if n > 1 and self.clock.spent + expected > until:
                    self.clock.left_out.append(f"{what} and more: about {expected:.0f} s")
                    open_parts.discard(part)
                    continue
                for mode in ("parity", "default"):
                    seconds = self.measure(part, n, mode, self.chain(parity=mode == "parity"))
                    if seconds is None:
                        open_parts.discard(part)
                    else:
                        self.cost[part] = min(self.cost[part], seconds / n)
                        self.cost.setdefault(f"{part} alone", seconds)
            n *= 2

    def predict(self, name: str, size: int, reward: type[Reward], steps: int) -> tuple[float, float]:
        """Returns the expected seconds of a batch, and of the loop that evaluates one row at a time."""
        model = self.model(name, size, reward, steps, reset=False, parity=True)  # which moves no weights
        assert model.cost is not None
        rows, images = model.cost.denoiser_rows, model.cost.decoded_images
        alone = rows * self.cost["network alone"] + images * self.cost["decoder alone"]
        return rows * self.cost["network"] + images * self.cost["decoder"], alone

    def model(self, name: str, size: int, reward: type[Reward], steps: int, **options: Any) -> GuidedDiffusion:
        """Returns the guided model."""
        return GuidedDiffusion(reward(), self.chain(steps, **options), MAKERS[name](size))

    def choose_steps(self, most: int | None) -> int:
        """Returns the largest T at which all samplers at their full sizes and their loops take 60 % of what is left."""
        most = most or min(STEPS[0], self.chain(reset=False, parity=True).default_steps)
        for steps in sorted({most, *(each for each in STEPS if each < most)}, reverse=True):
            found = [(name, self.predict(name, sizes[0], kind, steps)) for name, sizes, kind in JOBS]
            total = sum(own + (own + alone if name != "SMC" else 0) for name, (own, alone) in found)
            if total <= 0.6 * self.clock.left:
                return steps
        return min(most, STEPS[-1])

    def measure_samplers(self, steps: int) -> None:
        """Times guided sampling and the loops of a user with as many calls."""
        for name, sizes, kind in JOBS:
            for size in sizes:
                own, alone = self.predict(name, size, kind, steps)
                compares = name != "SMC" and kind is Compressibility
                needed = own + (alone if compares and size != sizes[-1] else 0)
                if size != sizes[0]:
                    fits = needed <= 0.6 * self.clock.left
                else:
                    fits = self.clock.fits(needed, f"{name}, {size}, {kind.__name__}", share=0.6)
                if fits:
                    run = self.run(model := self.model(name, size, kind, steps), name, size)
                    self.runs.append(run)
                    if compares and "error" not in run:
                        self.compare(run, model, name, size, steps)
                    break

    def run(self, model: GuidedDiffusion, name: str, size: int, mode: str = "default") -> dict[str, Any]:
        """Draws one image and returns the time, its shares, the counts of the ledger and the memory."""
        record: dict[str, Any] = {"sampler": name, "size": size, "reward": model.reward.name, "mode": mode}
        chain, encode, spent = model.diffusion, model.diffusion.encode, list[float]()

        def encoded(*arguments: Any) -> Any:
            result: list[Any] = []
            spent.append(self.timed(lambda: result.append(encode(*arguments))))
            return result[0]

        chain.encode = encoded  # type: ignore[method-assign]
        memory = self.fresh_memory()
        try:
            record["seconds"] = self.timed(lambda: self.require_finite(model.draw([PROMPT], [0]).images))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return record | {"error": "out of memory"}
        finally:
            del chain.encode
        ledger, whole = model.ledger, record["seconds"]
        assert ledger is not None
        counts = ledger.per_image(1)
        named = {part: counts[f"{part}_seconds"] for part in ("denoiser", "decoder", "reward")} | {
            "encoder": sum(spent)
        }
        record["shares"] = {part: seconds / whole for part, seconds in named.items()}
        record["shares"]["rest"] = 1 - sum(named.values()) / whole
        record |= {each: counts[each] for each in ("denoiser_rows", "network_rows", "decoded_images", "reward_calls")}
        return record | self.taken(memory)

    def compare(self, run: dict[str, Any], model: GuidedDiffusion, name: str, size: int, steps: int) -> None:
        """Times a user's loops of as many calls and enters them into the record of a run."""
        chain: Any = model.diffusion
        counts = [size if chain.std(i) > 0 else 1 for i in range(steps)]
        own, alone = self.predict(name, size, Compressibility, steps)
        scheduler, _ = self.pipe.scheduler, self.chain(parity=True)  # a user's pipeline is not reordered
        loops = PlainLoops(self.pipe, steps, chain.guidance_scale, self.shape.pixels)
        for label, together, expected, share in (("one by one", False, alone, 0.9), ("at once", True, own, 0.4)):
            if not self.clock.fits(expected, f"loop, {label}, for {name}, {size}", share):
                continue
            run[label] = loop = {}
            try:
                with Calls(self.pipe) as calls:
                    if name == "SVDD":
                        seconds = self.timed(lambda: loops.svdd(PROMPT, counts, together))  # noqa: B023
                    else:
                        seconds = self.timed(lambda: loops.best_of_n(PROMPT, size, together))  # noqa: B023
                loop |= {"seconds": seconds, "network_rows": calls.network, "decoded_images": calls.decoder}
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                loop["error"] = "out of memory"
        self.pipe.scheduler = scheduler

    def measure_compiled(self, steps: int) -> None:
        """Compiles decoder and network, whose first calls are timed apart, and repeats the largest calls and SVDD."""
        if not self.compiles:
            self.clock.left_out.append("compile: not wanted")
            return
        layers = {"decoder": leaves(self.pipe.vae.decoder), "network": leaves(network_of(self.pipe))}
        per_leaf = 1.0 if self.device.type == "cpu" else 0.2  # seconds, a guess until the decoder is compiled
        chain = self.chain(compile=True)
        for part in ("decoder", "network"):
            done = [record["rows"] for record in self.rows if record["part"] == part and "seconds" in record]
            if not done:
                return
            rows = max((n for n in done if n * self.cost[part] < LONG), default=min(done))
            expected = per_leaf * layers[part] + 3 * rows * self.cost[part]
            if not self.clock.fits(expected, f"compiling the {part}"):
                return
            with torch.inference_mode():
                call = self.call(chain, part, rows)
                try:
                    first = self.timed(call)
                except Exception as error:  # no compiler, an operation that it does not know, no memory
                    self.clock.left_out.append(f"compiling the {part}: {first_line(error)}")
                    return
            self.compile_seconds[part] = first - min(first, rows * self.cost[part])
            per_leaf = max(per_leaf, self.compile_seconds[part] / layers[part])
            self.measure(part, rows, "compiled", chain)
        found = next((run for run in self.runs if run["sampler"] == "SVDD" and "error" not in run), None)
        if found is not None and self.clock.fits(2 * found["seconds"], "compiled SVDD"):
            model = self.model("SVDD", found["size"], Compressibility, steps, compile=True)
            self.compile_seconds["SVDD"] = self.timed(lambda: model.draw([PROMPT], [1]))  # compiles for its rows
            self.runs.append(self.run(model, "SVDD", found["size"], "compiled"))
