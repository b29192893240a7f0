"""The memory of `svdd app` over 50 jobs of different visitors, samplers and rewards. Writes benchmarks/app.md."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

JOBS, EVERY = 50, 5
SAMPLERS = ("SVDD", "SMC", "BestOfN", "BeamSearch", "DPS", "RandomSearch", "ZeroOrderSearch")
REWARDS = ("CLIPScore", "CLIPScore - 0.01 * Brightness", "CLIPScore(dtype=bfloat16)")
MIB = 2**20


class Server:
    """A running `svdd app`, and the requests that its page makes."""

    def __init__(self, *words: str, **environment: str) -> None:
        known = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        command = [sys.executable, "-m", "svdd", "app", "--port", "0", "--device", "cpu", *words]
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=known, **pipes)
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if (address := re.search(r"http://\S+", line)) is None:
            raise RuntimeError(self.process.communicate()[1])
        self.url = address[0]
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self._config = self.http.get("/config").json()
        self._draw = next(k for k, each in enumerate(self._config["dependencies"]) if len(each["inputs"]) > 10)

    def values(self, **changed: object) -> list[object]:
        """Returns what the page sends as it is at the start, but for some components, by their id."""
        parts = {part["id"]: part["props"] for part in self._config["components"]}
        inputs = [parts[number] for number in self._config["dependencies"][self._draw]["inputs"]]
        if unknown := changed.keys() - {each.get("elem_id") for each in inputs}:
            raise KeyError(unknown)
        return [changed.get(each.get("elem_id"), each.get("value")) for each in inputs]

    def send(self, name: str, session: str, values: list[object]) -> None:
        """Calls a function of the page: begin, draw or stop."""
        place = {"begin": self._draw - 1, "draw": self._draw, "stop": self._draw + 2}[name]
        number = self._config["dependencies"][place]["id"]
        path = "/gradio_api/queue/join" if name == "draw" else "/gradio_api/run/predict"
        body = {"fn_index": number, "data": values, "session_hash": session}
        self.http.post(path, json=body).raise_for_status()

    def results(self, session: str) -> Iterator[str]:
        """Yields the outputs of the session's job as JSON, after the first as changes."""
        with self.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as answer:
            for line in answer.iter_lines():
                message = json.loads(line[5:]) if line.startswith("data:") else {"msg": ""}
                if "output" in message:
                    yield json.dumps(message["output"])
                if message["msg"] == "process_completed":
                    return

    def draw(self, session: str, **changed: object) -> list[str]:
        """Draws, and returns the outputs."""
        self.send("begin", session, [])
        self.send("draw", session, self.values(**changed))
        return list(self.results(session))

    def close(self) -> tuple[int, str]:
        """Ends the server; returns its exit code and what it wrote to stderr."""
        self.http.close()
        self.process.send_signal(signal.SIGINT)
        error = self.process.communicate(timeout=30)[1]
        return self.process.returncode, error


def measured(server: Server) -> list[str]:
    """Draws the jobs; returns the rows of the table."""
    process, lines = psutil.Process(server.process.pid), []
    for k in range(1, JOBS + 1):
        session, images = f"visitor{k}", 1 + k % 2
        changed = {"sampler": SAMPLERS[k % len(SAMPLERS)], "reward": REWARDS[k % len(REWARDS)], "seed": k}
        server.send("begin", session, [])
        server.send("draw", session, server.values(**changed, steps=4, images=images))
        if k % 10 == 0:
            server.send("stop", session, [])
        found = list(server.results(session))
        if not any(word in found[-1] for word in ("Done", "Stopped")):
            raise RuntimeError(found[-1])
        if k % EVERY == 0:
            lines.append(f"| {k} | {process.memory_info().rss / MIB:.0f} | {process.num_threads()} |")
            print(lines[-1], flush=True)
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/app.md"))
    output, server = parser.parse_args(arguments).output, Server()
    try:
        lines = measured(server)
    finally:
        server.close()
    text = f"""# Memory of svdd app

{JOBS} jobs of as many visitors on the embedded model, T = 4, 1 or 2 images, by turns {", ".join(SAMPLERS)} and
{len(REWARDS)} rewards; every tenth job is stopped. Resident memory of the server's process after so many jobs. Made by
`python -m benchmarks.app_memory`.

| jobs | MiB | threads |
|---:|---:|---:|
"""
    output.write_text(text + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
