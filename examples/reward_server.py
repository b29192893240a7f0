"""Serves a reward to `HTTPReward`: python reward_server.py CLIPScore 8000. Protocol: docs/how_to/reward_service.md."""

import base64
import io
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import torch
from PIL import Image

from svdd import rewards


class Handler(BaseHTTPRequestHandler):
    """Answers POST with scores and GET with a version; a run continues only while the version is the same."""

    reward = getattr(rewards, sys.argv[1] if len(sys.argv) > 1 else "CLIPScore")()  # or any function of your own

    def do_POST(self) -> None:
        """Scores the images of a request."""
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        files = [io.BytesIO(base64.b64decode(image)) for image in request["images"]]
        images = torch.from_numpy(np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files]))
        with torch.no_grad():
            scores = self.reward.score(images.permute(0, 3, 1, 2) / 255, request["prompts"])
        self.reply({"scores": scores.tolist()})

    def do_GET(self) -> None:
        """States the version."""
        self.reply({"version": f"{self.reward.name} 1"})

    def reply(self, told: dict) -> None:
        """Sends JSON."""
        content = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2]) if len(sys.argv) > 2 else 8000), Handler)
    print(f"http://127.0.0.1:{server.server_port}/score", flush=True)
    server.serve_forever()
