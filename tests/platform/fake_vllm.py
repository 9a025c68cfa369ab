#!/usr/bin/env python3
"""Stands for vLLM's Python in tests of the part that starts it: it answers the routes that the part
asks, and does what files beside it say."""

import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FOLDER = Path(__file__).parent
METRICS = b"""# HELP vllm:num_requests_running running
vllm:num_requests_running{engine="0",model_name="a"} 1.0
vllm:prompt_tokens_total{engine="0",model_name="a"} 7.0
vllm:generation_tokens_total{engine="0",model_name="a"} 1.5e+01
"""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if (FOLDER / "silent").exists():
            time.sleep(60)
        is_dead = self.path == "/health" and (FOLDER / "dead").exists()
        self.send_response(503 if is_dead else 200)
        self.end_headers()
        if self.path == "/metrics":
            self.wfile.write(METRICS)

    def log_message(self, *args):
        pass


arguments = sys.argv[1:]
with (FOLDER / "starts").open("a") as starts:
    starts.write(f"{os.environ['VLLM_API_KEY']} {' '.join(arguments)}\n")
port = int(arguments[arguments.index("--port") + 1])
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
