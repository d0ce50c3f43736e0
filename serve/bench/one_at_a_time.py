"""What one would write in an afternoon: FastAPI, the model behind a lock, one image at a time. The bench's other side.

Command: python -m serve.bench.one_at_a_time RUN PORT BEAMS WORDS THREADS
"""

import base64
import sys
import threading
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI

from mmcore.captioners.search_options import SearchOptions
from mmcore.frozen.vision import pixels_from_bytes
from mmcore.trained.captioner import open_captioner


def make_app(run: str, num_beams: int, num_words: int, num_threads: int) -> FastAPI:
    captioner, lock, app = open_captioner(run).load(), threading.Lock(), FastAPI()

    options = SearchOptions(num_beams, num_words)

    @app.get("/ready")
    def ready() -> dict[str, str]:
        return {"status": "ready"}

    @app.post("/v1/chat/completions")
    def chat(body: dict[str, Any]) -> dict[str, Any]:
        uri = body["messages"][0]["content"][0]["image_url"]["url"]
        with lock:
            # Torch keeps it by thread, and FastAPI has many.
            torch.set_num_threads(num_threads)
            image = base64.b64decode(uri.partition(",")[2])
            (caption,) = captioner.caption(pixels_from_bytes([image], captioner.image_size, ["image"]), options)
        return {"choices": [{"message": {"content": caption}}]}

    return app


if __name__ == "__main__":
    folder, port, beams, words, threads = sys.argv[1:]
    uvicorn.run(make_app(folder, int(beams), int(words), int(threads)), port=int(port), log_level="warning")
