"""A stand-in for `vllm serve FOLDER`: the part of vLLM's HTTP interface that the toolkit uses, with a real model.

Nobody answers before FOLDER is there and its model read. As vLLM 0.32 on a CPU does, it

- re-reads its weights from the folder that it is told; a model that is tied keeps the output head that it started with,
  unless that folder has a tensor of its own for it;
- is of no use any more after a reload that failed;
- keeps what it computed for a prompt until its prefix cache is reset: text after a reload without a reset begins by old
  weights.

It is stricter where a field of a request is unknown: vLLM ignores those, and a wrong name would not be noticed. `fault`
makes it misbehave; other processes set it over HTTP, at /fault.
"""

import hashlib
import json
import socket
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
        self.folder, self.max_model_len = Path(folder), max_model_len
        self.lock, self.prefixes, self.fault, self.is_down = threading.Lock(), {}, {}, False
        self.log = []  # (prompt, text, digest of the weights) of each text
        self.reloads, self.own_ends = [], set()
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

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
        self.http.daemon_threads = True
        self.http.server_bind()  # and nobody listens yet
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.closed = threading.Event()
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while not (self.folder / "config.json").exists():
            if self.closed.wait(0.05):
                return
        self.boot()
        self.http.server_activate()
        self.http.serve_forever()

    def boot(self):
        self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        self.head = self.model.lm_head.weight.detach().clone()  # a copy, which a reload renews or not
        ends = self.model.generation_config.eos_token_id
        # vLLM adds those of generation_config.json to a request's own, also with --generation-config vllm
        self.own_ends |= {self.model.config.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        self.is_down = False

    def close(self):
        self.closed.set()
        if self.http.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            self.http.shutdown()
        self.http.server_close()

    @property
    def digest(self):
        parts = (tensor.numpy().tobytes() for tensor in [*self.model.state_dict().values(), self.head])
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def handle(self, path, body):
        fault = self.fault
        if path == "/fault":
            self.fault = body
            if body.get("starts_again"):
                self.boot()
            return 200, None
        if path == "/v1/models":
            length = fault.get("max_model_len", self.max_model_len)
            root = fault.get("root", str(self.folder))
            return 200, {"data": [{"id": "student", "root": root, "parent": None, "max_model_len": length}]}
        if path in ("/collective_rpc", "/reset_prefix_cache") and fault.get("no_dev_mode"):
            return 404, {"detail": "Not Found"}
        if self.is_down:
            return 500, told("EngineCore encountered an issue. See stack trace (above) for the root cause.", 500)
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights" and body["kwargs"].keys() == {"weights_path"}
            try:
                with self.lock:
                    self.reload(Path("/elsewhere" if fault.get("sees_other_files") else body["kwargs"]["weights_path"]))
            except Exception as error:
                self.is_down = True
                return 500, told(f"Call to collective_rpc method failed: Worker failed with error '{error}'", 500)
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
        if body["model"] != "student":
            return 404, told(f"The model `{body['model']}` does not exist.", 404)
        vocab_size = self.model.config.vocab_size
        if max(body["prompt"]) >= vocab_size:
            return 400, told(f"Token id {max(body['prompt'])} is out of vocabulary", 400)
        with self.lock:
            choice = self.complete(body)
        if "seed" in body:
            choice |= fault.get("choice", {})
            self.log.append((body["prompt"], choice["token_ids"], self.digest))
        return 200, {"choices": [choice], "model": "student", "usage": {}}

    def reload(self, folder):
        """`fault` says which tensors stay as they are: those whose name has "keeps" in it, from "keeps_after" reloads
        on."""
        kept, state = self.fault.get("keeps"), self.model.state_dict()
        is_kept = kept is not None and len(self.reloads) >= self.fault.get("keeps_after", 0)
        for name, weight in load_file(folder / "model.safetensors").items():
            if is_kept and kept in name:
                continue
            state[name].copy_(weight)  # in place; of a tied model this is the head of the module, too
            if name == "lm_head.weight":
                self.head = weight
        self.reloads.append(self.digest)

    @torch.no_grad()
    def logits(self, ids):
        return self.model.model(torch.tensor([ids])).last_hidden_state[0] @ self.head.T

    @torch.no_grad()
    def complete(self, body):
        prompt, said, reason = body["prompt"], [], "length"
        draws = torch.Generator().manual_seed(body.get("seed", 0))
        logits_TV = self.logits(prompt)
        ends = {*body.get("stop_token_ids", ()), *(() if body.get("ignore_eos") else self.own_ends)}
        while len(said) < body["max_tokens"]:
            logits_V = self.logits(prompt + said)[-1]
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
            found_T = logits_TV.log_softmax(-1)[:-1].gather(1, torch.tensor(prompt[1:])[:, None]).squeeze(1)
            found = (found_T + self.fault.get("noise_nats", 0) * torch.randn_like(found_T)).tolist()
            choice["prompt_logprobs"] = [None] + [
                {str(token): {"logprob": value, "rank": 1}} for token, value in zip(prompt[1:], found, strict=True)
            ]
        return choice


def told(text, status):
    return {"error": {"message": text, "type": "stand-in", "code": status}}
