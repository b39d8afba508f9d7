"""A stand-in for `vllm serve FOLDER`: the part of vLLM 0.33's HTTP interface that the toolkit uses, with a real model.

It knows the names of vLLM's own request fields and refuses others, re-reads its weights from the folder that it is
told, and keeps what it computed for a prompt until its prefix cache is reset, as vLLM does: text after a reload without
a reset begins by old weights. `fault` makes it misbehave; other processes set it over HTTP, at /fault.
"""

import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

#: of vllm/entrypoints/openai/completion/protocol.py, CompletionRequest
FIELDS = {
    "model", "prompt", "echo", "frequency_penalty", "logit_bias", "logprobs", "max_tokens", "n", "presence_penalty",
    "seed", "stop", "stream", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop_token_ids",
    "ignore_eos", "min_tokens", "skip_special_tokens", "prompt_logprobs", "allowed_token_ids", "return_token_ids",
    "return_tokens_as_token_ids",
}  # fmt: skip


class StandIn:
    def __init__(self, folder, max_model_len=256):
        self.folder, self.max_model_len = str(folder), max_model_len
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ends = self.model.generation_config.eos_token_id
        # vLLM adds those of generation_config.json to a request's own, also with --generation-config vllm
        self.own_ends = {self.model.config.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        self.lock, self.prefixes, self.fault = threading.Lock(), {}, {}
        self.log = []  # (prompt, text, digest of the weights) of each text
        self.reloads = []
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer(None)

            def do_POST(self):
                self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "null"))

            def answer(self, body):
                try:
                    status, content = stand_in.handle(self.path, body)
                except Exception as error:
                    status, content = 500, told(f"{type(error).__name__}: {error}", 500)
                payload = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    @property
    def digest(self):
        parts = (tensor.numpy().tobytes() for tensor in self.model.state_dict().values())
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def handle(self, path, body):
        fault = self.fault
        if path == "/fault":
            self.fault = body
            return 200, None
        if path == "/v1/models":
            length = fault.get("max_model_len", self.max_model_len)
            return 200, {"data": [{"id": self.folder, "root": self.folder, "parent": None, "max_model_len": length}]}
        if path in ("/collective_rpc", "/reset_prefix_cache") and fault.get("no_dev_mode"):
            return 404, {"detail": "Not Found"}
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights" and body["kwargs"].keys() == {"weights_path"}
            with self.lock:
                if not fault.get("keeps_weights"):
                    self.reload(Path(body["kwargs"]["weights_path"]))
            return 200, {"results": [None]}
        if path == "/reset_prefix_cache":
            self.prefixes.clear()
            return 200, {"success": True}
        if path != "/v1/completions":
            return 404, {"detail": "Not Found"}
        if "seed" in body:  # generation, and not the look at its weights
            time.sleep(fault.get("delay_s", 0))
            if fault.get("failures", 1) > 0 and "status" in fault:
                fault["failures"] = fault.get("failures", 1 << 30) - 1
                return fault["status"], told("made to fail", fault["status"])
        if unknown := body.keys() - FIELDS:
            return 400, told(f"unknown fields {sorted(unknown)}", 400)
        if body["model"] != self.folder:
            return 404, told(f"The model `{body['model']}` does not exist.", 404)
        vocab_size = self.model.config.vocab_size
        if max(body["prompt"]) >= vocab_size:
            return 400, told(f"Token id {max(body['prompt'])} is out of vocabulary", 400)
        with self.lock:
            choice = self.complete(body)
        if "seed" in body:
            choice |= fault.get("choice", {})
            self.log.append((body["prompt"], choice["token_ids"], self.digest))
        return 200, {"choices": [choice], "model": self.folder, "usage": {}}

    def reload(self, folder):
        weights = load_file(folder / "model.safetensors")
        if self.model.config.tie_word_embeddings:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        self.model.load_state_dict(weights)
        self.reloads.append(self.digest)

    @torch.no_grad()
    def complete(self, body):
        prompt, said, reason = body["prompt"], [], "length"
        draws = torch.Generator().manual_seed(body.get("seed", 0))
        logits_TV = self.model(torch.tensor([prompt])).logits[0]
        ends = {*body.get("stop_token_ids", ()), *(() if body.get("ignore_eos") else self.own_ends)}
        while len(said) < body["max_tokens"]:
            logits_V = self.model(torch.tensor([prompt + said])).logits[0, -1]
            if not said and "prompt_logprobs" not in body:
                logits_V = self.prefixes.setdefault(tuple(prompt), logits_V).clone()
            for token, bias in body.get("logit_bias", {}).items():
                logits_V[int(token)] += bias
            if body["temperature"] == 0:
                token = int(logits_V.argmax())
            else:
                token = int(torch.multinomial((logits_V / body["temperature"]).softmax(-1), 1, generator=draws))
            said.append(token)
            if token in ends:
                reason = "stop"
                break
        choice = {"index": 0, "text": "", "finish_reason": reason, "token_ids": None, "prompt_logprobs": None}
        if body.get("return_token_ids"):
            choice["token_ids"] = said
        if body.get("prompt_logprobs") is not None:
            found = logits_TV.log_softmax(-1)[:-1].gather(1, torch.tensor(prompt[1:])[:, None]).squeeze(1).tolist()
            choice["prompt_logprobs"] = [None] + [
                {str(token): {"logprob": value, "rank": 1}} for token, value in zip(prompt[1:], found, strict=True)
            ]
        return choice


def told(text, status):
    return {"error": {"message": text, "type": "stand-in", "code": status}}
