"""A real HTTP server on loopback that answers chat completions with the torch engine: a hosted model for tests."""

import json
import math
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from serve.engine import Request
from serve.loading import encode_prompt


@contextmanager
def subject_server(engine, *, logprobs=True, fail=lambda body: None, key="secret"):
    """Serve an engine; ``fail(body)`` may return a status (429 asks for a long wait). Yields url and what was asked."""
    asked, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                asked.append(body)
                status = fail(body) or (200 if self.headers["Authorization"] == f"Bearer {key}" else 401)
                answer = complete(engine, body, logprobs) if status == 200 else {"error": {"message": "planted"}}
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if status == 429:
                self.send_header("Retry-After", "999")  # seconds: more than anybody waits
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def complete(engine, body, logprobs):
    """One chat completion; a begun answer is continued."""
    user, *begun = body["messages"]
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    if body.get("logprobs") and limit == 1:
        ids = encode_prompt(engine.tokenizer, user["content"])
        for message in begun:
            ids += engine.tokenizer.encode(message["content"], add_special_tokens=False)
        with torch.inference_mode():
            odds = torch.log_softmax(engine.model(torch.tensor([ids])).logits[0, -1], dim=0)
        best = odds.topk(min(body["top_logprobs"], len(odds)))
        listed = [
            {"token": engine.tokenizer.decode([i]), "logprob": p}
            for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            if math.isfinite(p)
        ]
        text, reason, n = listed[0]["token"], "length", 1
        content = [{**listed[0], "top_logprobs": listed}]
    else:
        request = Request(user["content"], body.get("seed", 0), 0, 1)
        ((reply,),) = engine.sample([request], key=1, temperature=body["temperature"], max_tokens=limit)
        text, reason, n, content = reply.text, reply.finish_reason, reply.n_tokens, None
    return {
        "model": body["model"],
        "choices": [
            {
                "message": {"role": "assistant", "content": text},
                "finish_reason": reason,
                "logprobs": {"content": content} if logprobs and content else None,
            }
        ],
        "usage": {"prompt_tokens": 10, "completion_tokens": n},
    }
