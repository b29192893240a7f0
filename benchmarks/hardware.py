"""The speed and memory of svdd on a device, with random weights of a published shape; nothing is downloaded.

Measures the network and the decoder by rows, in both memory formats and compiled, and guided sampling against loops
over the diffusers pipeline. Costs are measured first; what would not fit into the time is left out and named. Replaces
the section of this shape, device and precision in benchmarks/hardware.md and keeps the others.
"""

import argparse
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch

from benchmarks.clock import Clock
from benchmarks.hardware_bench import Bench
from benchmarks.hardware_page import write
from benchmarks.shapes import SHAPES
from svdd import is_out_of_memory
from svdd.diffusion.pipelines import DTYPES

__all__ = ["main"]


def device_name(device: torch.device) -> str:
    """Returns the name of the card or of the CPU."""
    if device.type == "cpu":
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        name = (names or [platform.processor() or platform.machine()])[0]
        return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    module = torch.get_device_module(device)
    return module.get_device_name(device) if hasattr(module, "get_device_name") else f"{platform.machine()} {device}"


def usable(name: str) -> torch.device:
    """Returns a device that computes; raises ValueError."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).add_(1).item()
    except Exception as error:
        raise ValueError(f"--device {name}: this machine or this build of PyTorch has no such device") from error
    return device


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, writes the page and returns the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="sd15")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, xpu; by default an accelerator if there is one")
    parser.add_argument(
        "--dtype",
        choices=["auto", *list(DTYPES)[1:]],
        default="auto",
        help="by default float32 on a CPU, else float16 for a UNet and bfloat16 for a transformer",
    )
    parser.add_argument("--steps", type=int, help="most T; by default the pipeline's; fewer if the time is short")
    parser.add_argument("--rows", type=int, default=64, help="most rows of a call of the network or the decoder")
    parser.add_argument("--minutes", type=float, default=10, help="the time to take; what would not fit is left out")
    parser.add_argument("--no_compile", action="store_true", help="do not measure torch.compile")
    parser.add_argument("--note", default="", help="a sentence for the page, such as what else ran on the machine")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args(arguments)
    if options.steps is not None and options.steps < 2:
        parser.error(f"--steps must be at least 2, got {options.steps}")
    if options.rows < 1:
        parser.error(f"--rows must be at least 1, got {options.rows}")
    if not options.minutes > 0:
        parser.error(f"--minutes must be above 0, got {options.minutes}")
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    try:
        device = usable(options.device or (accelerator.type if accelerator else "cpu"))
    except ValueError as error:
        parser.error(str(error))
    shape, clock = SHAPES[options.shape], Clock(options.minutes)
    dtype = DTYPES[options.dtype]
    if options.dtype == "auto" and device.type != "cpu":
        dtype = torch.bfloat16 if shape.flow else torch.float16
    try:
        pipe = shape.build(device, dtype)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        parser.error(f"the weights of {shape.name} in {dtype} do not fit into the memory of {device}")
    bench = Bench(pipe, shape, device, clock, options.rows, compiles=not options.no_compile)
    built = clock.spent
    bench.measure_rows()
    steps = bench.choose_steps(options.steps)
    bench.measure_samplers(steps)
    bench.measure_compiled(steps)
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    section = {
        "shape": options.shape,
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "pixels": shape.pixels,
        "steps": steps,
        "weights_gib": sum(weight.nbytes for part in parts for weight in part.parameters()) / 2**30,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "minutes": clock.spent / 60,
        "limit_minutes": options.minutes,
        "build_seconds": built,
        "note": options.note,
        "rows": bench.rows,
        "runs": bench.runs,
        "compile_seconds": bench.compile_seconds,
        "left_out": clock.left_out,
    }
    print(write(options.output, section))
    return section


if __name__ == "__main__":
    main()
