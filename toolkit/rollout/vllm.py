"""Student text from a vLLM server: token ids over its OpenAI-style HTTP interface, weights through a shared folder.

Tried with vLLM 0.32, started in development mode (docs/rollout.md): `/v1/completions` with `return_token_ids`, and
after each export `/collective_rpc` with `reload_weights` and `/reset_prefix_cache`. Nothing of vLLM is imported.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import ssl
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from toolkit.batch import Example
from toolkit.models import Student, Vocabulary
from toolkit.models.export import export_student
from toolkit.ranks import collectives
from toolkit.rollout.arrival import Arrivals, probe_tokens, write_start
from toolkit.rollout.local import Rollout, RolloutStats, SeededSampling, check_prompts, evaluation_mode, joined
from toolkit.settings import RunConfig

START = "start"  # folder that the server starts with: the student's shapes, and weights that are not the student's
HAND_OVER = "hand-over"  # folder of the student's weights at the start of the run
REQUESTS_AT_ONCE = 64  # of one rank; the server makes batches of what all ranks ask
RETRIES = 3  # of a connection that fails, or a server that is overloaded
MOST_BANNED = 1024  # entries of logit_bias that vLLM's newer GPU runner takes


class VllmRollout(Rollout):
    """Every rank asks the server for its own texts; rank 0 hands the weights over.

    `sync_weights(step)` pushes where no push lies between `step` and the last multiple of rollout.sync_every_steps, so
    weights are less than that many steps old. The first call after a resume pushes. What the server says of fixed
    tokens then shows whether they arrived (`toolkit.rollout.arrival`).
    """

    name = "vllm"

    def __init__(self, config: RunConfig, student: Student, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary):
        self.settings = config.rollout
        self.max_length = max(config.data.max_length, config.data.max_prompt_length + config.max_new_tokens)
        self.student, self.tokenizer, self.vocabulary = student, tokenizer, vocabulary
        self.folder = Path(self.settings.weights_dir or config.run_dir / "vllm").absolute()
        self.server = Server(self.settings.server)
        self.pushed, self.served_name, self.max_model_len = False, "", 0
        self.arrivals = Arrivals()
        head_rows = student.model.config.get_text_config().vocab_size
        # Columns past the tokenizer's end count as minus infinity everywhere; -100 is vLLM's lowest.
        self.banned = {str(token): -100.0 for token in range(vocabulary.size, head_rows)}
        if len(self.banned) > MOST_BANNED:
            raise ValueError(
                f"the student's head has {head_rows} rows, its tokenizer {vocabulary.size} entries, and vLLM forbids "
                f"at most {MOST_BANNED} ids, not {len(self.banned)}; cut the head to the tokenizer, or set "
                "rollout.engine=local"
            )

    def start(self) -> None:
        """Export the student, wait up to rollout.server_timeout_s for the server, and make sure that it is the right
        one. Collective; raises ValueError on every rank."""
        self.arrivals = Arrivals()
        folder = self.folder / HAND_OVER
        export_student(self.student, self.tokenizer, folder, untie_head=True)
        collectives.from_main_rank(lambda: write_start(folder, self.folder / START))
        self.served_name, self.max_model_len = collectives.from_main_rank(self._wait_for_server)
        collectives.together(lambda: self._check_room(self.max_length))
        self._hand_over(folder)

    def sync_weights(self, step: int) -> None:
        """Collective; raises ValueError on every rank where the weights do not arrive."""
        every = self.settings.sync_every_steps
        if self.pushed and step // every == self.weights_step // every:
            return
        # A name that the server never read: file systems over a network may show it the old file under an old name.
        folder = self.folder / f"step-{step:08d}"
        export_student(self.student, self.tokenizer, folder, untie_head=True)
        self._hand_over(folder)
        self.weights_step, self.pushed = step, True

    def complete(self, prompts: Sequence[np.ndarray], sampling: SeededSampling) -> list[Example]:
        """See `Rollout`. All of a call's requests together may take rollout.server_timeout_s. Raises ValueError, on
        every rank, for a server that does not answer, or answers what it was not asked."""
        collectives.together(lambda: check_prompts(prompts, sampling, self.vocabulary))
        started_s = time.perf_counter()
        texts = collectives.together(lambda: self._texts(prompts, sampling))
        self.last = RolloutStats(
            self.name, time.perf_counter() - started_s, len(texts), sum(map(len, texts)), len(texts),
            min(len(texts), self._at_once), 0.0,
        )  # fmt: skip
        return joined(prompts, texts)

    @property
    def _at_once(self) -> int:
        return self.settings.rows_at_once or REQUESTS_AT_ONCE

    @property
    def _deadline_s(self) -> float:
        return time.monotonic() + self.settings.server_timeout_s

    def _texts(self, prompts: Sequence[np.ndarray], sampling: SeededSampling) -> list[np.ndarray]:
        self._check_room(max((len(prompt) for prompt in prompts), default=0) + sampling.max_new_tokens)
        deadline_s = self._deadline_s

        def text(prompt: np.ndarray, seed: int) -> np.ndarray:
            return self._text(prompt, seed, sampling, deadline_s)

        # A request that fails cancels those that are not made yet.
        with ThreadPoolExecutor(max(1, min(len(prompts), self._at_once))) as pool:
            return list(pool.map(text, prompts, sampling.seeds))

    def _check_room(self, longest: int) -> None:
        if longest > self.max_model_len:
            raise ValueError(
                f"a prompt and its text may take {longest} tokens, the vLLM server at {self.server.url} holds "
                f"{self.max_model_len}; start it with --max-model-len {longest}"
            )

    def _text(self, prompt: np.ndarray, seed: int, sampling: SeededSampling, deadline_s: float) -> np.ndarray:
        asked = {
            "max_tokens": sampling.max_new_tokens,
            "temperature": max(0.0, sampling.temperature),
            "top_p": sampling.top_p,
            "top_k": max(0, sampling.top_k),
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "seed": int(seed) % 2**63,
            "ignore_eos": True,  # the server knows ends of its own, from the model's generation_config.json
            "stop_token_ids": list(self.vocabulary.eos_ids),
            "return_token_ids": True,
            "skip_special_tokens": False,
        }
        if self.banned:
            asked["logit_bias"] = self.banned
        # What comes back is trained on, so it has to be a text of the student's vocabulary that ends where it should.
        choice = self._completion(prompt, asked, deadline_s)
        ids, reason, eos_ids = choice.get("token_ids"), choice.get("finish_reason"), self.vocabulary.eos_ids
        if not ids or not all(isinstance(token, int) for token in ids):
            raise self._wrong(f"answers with token_ids = {ids!r}; ids are what is trained on, and vLLM gives them")
        if unknown := [token for token in ids if not 0 <= token < self.vocabulary.size]:
            raise self._wrong(f"says the id {unknown[0]}, the student's vocabulary ends at {self.vocabulary.size - 1}")
        ends = [place for place, token in enumerate(ids) if token in eos_ids]
        if len(ids) > sampling.max_new_tokens or ends not in ([], [len(ids) - 1]):
            raise self._wrong(f"goes on after EOS or rollout.max_new_tokens: {len(ids)} tokens, EOS at {ends}")
        if not ends and (reason != "length" or len(ids) < sampling.max_new_tokens):
            raise self._wrong(
                f"ended a text after {len(ids)} of {sampling.max_new_tokens} tokens with id {ids[-1]} ({reason}), "
                f"which is not the tokenizer's EOS {list(eos_ids)}; start it with --generation-config vllm"
            )
        return np.array(ids, np.int32)

    def _completion(self, prompt: np.ndarray, asked: dict[str, Any], deadline_s: float) -> dict[str, Any]:
        body = {"model": self.served_name, "prompt": [int(token) for token in prompt]} | asked
        answer = self.server.ask("POST", "/v1/completions", deadline_s, body)
        try:
            return dict(answer["choices"][0])
        except (KeyError, IndexError, TypeError, ValueError):
            raise self._wrong(f"answers {str(answer)[:200]!r}, which holds no completion") from None

    def _wait_for_server(self) -> tuple[str, int]:
        """(name of the served model, tokens it holds) of a server that was started with this run's folder."""
        # Nobody may listen yet, which is waited for; a server that answers otherwise is refused at once.
        deadline_s, told = self._deadline_s, False
        while True:
            try:
                models = self.server.ask("GET", "/v1/models", deadline_s, retries=0)["data"]
                model = next(model for model in models if not model.get("parent"))
                self._check_root(str(model["root"]))
                return str(model["id"]), int(model["max_model_len"])
            except NoAnswer as error:
                if time.monotonic() + 1 > deadline_s:
                    raise ValueError(
                        f"{error}; waited rollout.server_timeout_s = {self.settings.server_timeout_s:g} s. Install "
                        f"vLLM where the server is to run (pip install vllm) and start it with\n  {self._command}\n"
                        "or set rollout.engine=local"
                    ) from None
            except (KeyError, TypeError, ValueError, StopIteration) as error:
                if isinstance(error, ValueError):
                    raise
                raise self._wrong("does not list its models as vLLM does") from None
            if not told:
                print(f"waiting for the vLLM server at {self.server.url}; start it with\n  {self._command}", flush=True)
            told = True
            time.sleep(1)

    def _check_root(self, root: str) -> None:
        """A server that read its weights in this run's folder will find those that it is to reload, too: a reload that
        fails ends vLLM's engine. And what a reload leaves behind shows only in one that started with START."""
        started, start = Path(root), self.folder / START
        if started.is_absolute():
            is_ours = started.resolve() == start.resolve()
        else:  # to a working directory that is the server's own
            is_ours = start.parts[-len(started.parts) :] == started.parts
        if not is_ours:
            raise self._wrong(
                f"was started with {root}, and not with the folder that this run has written for it, {start}. Start "
                f"it with\n  {self._command}"
            )

    @property
    def _command(self) -> str:
        dtype = str(next(self.student.model.parameters()).dtype).removeprefix("torch.")
        port = urlsplit(self.server.url).port or 80
        return (
            f"VLLM_SERVER_DEV_MODE=1 vllm serve {self.folder / START} --generation-config vllm --dtype {dtype} "
            f"--max-model-len {self.max_length} --port {port}"
        )

    def _hand_over(self, folder: Path) -> None:
        """Have the server read the exported weights, forget what it computed by older ones, and show that it did."""
        ids = probe_tokens(self.vocabulary.size, self.max_length)
        wanted = self._own_log_probs(ids)
        collectives.from_main_rank(lambda: self._reload_and_check(folder, ids, wanted))

    def _reload_and_check(self, folder: Path, ids: np.ndarray, wanted: np.ndarray) -> None:
        deadline_s = self._deadline_s
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        self.server.ask("POST", "/collective_rpc", deadline_s, body)
        while not (self.server.ask("POST", "/reset_prefix_cache", deadline_s) or {}).get("success"):
            if time.monotonic() + 1 > deadline_s:  # other users' requests may hold blocks for a while
                raise self._wrong("does not give its prefix cache up, text would be by older weights")
            time.sleep(0.2)
        # It answers now, and what it says of the probe shows by which weights.
        found = self._servers_log_probs(ids, deadline_s)
        is_first = self.arrivals.folder is None
        if objection := self.arrivals.objection(folder, wanted, found):
            raise self._wrong(f"{objection}. Start it with\n  {self._command}")
        if is_first and not np.array_equal(found, self._servers_log_probs(ids, deadline_s)):
            print(
                f"warning: the vLLM server at {self.server.url}, asked twice, gives the same tokens other "
                "log-probabilities: weights that do not arrive show only when they differ by more than rounding",
                flush=True,
            )
        # The folder of this push stays: the next one is compared with it.
        for older in (self.folder / HAND_OVER, *self.folder.glob("step-*")):
            if older != folder:
                shutil.rmtree(older, ignore_errors=True)

    def _servers_log_probs(self, ids: np.ndarray, deadline_s: float) -> np.ndarray:
        """Of each token but the first."""
        said = self._completion(ids, {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}, deadline_s)
        try:
            places = zip(ids[1:], said["prompt_logprobs"][1:], strict=True)
            return np.array([place[str(token)]["logprob"] for token, place in places])
        except (KeyError, TypeError, ValueError):
            raise self._wrong("does not give prompt_logprobs as vLLM does") from None

    @torch.no_grad()
    def _own_log_probs(self, ids: np.ndarray) -> np.ndarray:
        """Of each token but the first; sharded, so every rank does it."""
        ids_1T = torch.from_numpy(ids)[None].to(collectives.device())
        with evaluation_mode(self.student.engine):
            log_probs_TV = self.student.model(input_ids=ids_1T, use_cache=False).logits[0].float().log_softmax(-1)
        return log_probs_TV[:-1].gather(1, ids_1T[0, 1:, None]).squeeze(1).cpu().numpy()

    def _wrong(self, text: str) -> ValueError:
        return ValueError(f"the vLLM server at {self.server.url} {text}")


class NoAnswer(ValueError):
    """Nobody listens there, or the connection broke."""


class Server:
    """JSON over HTTP, without the proxies of the environment; VLLM_API_KEY is sent where it is set."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        # A connection serves one request, so that no request meets one that the server has closed meanwhile.
        limits = httpx2.Limits(max_keepalive_connections=0)
        try:
            self.client = httpx2.Client(
                base_url=self.url, limits=limits, trust_env=False, verify=ssl.create_default_context()
            )
        except httpx2.InvalidURL as error:
            raise ValueError(f"rollout.server = {url!r} is no address ({error})") from None

    def ask(
        self, method: str, path: str, deadline_s: float, body: dict[str, Any] | None = None, retries: int = RETRIES
    ) -> Any:
        """The answer; a connection that fails and an overloaded server are tried again, until `deadline_s` of
        time.monotonic at the latest. Raises ValueError, with what the server said."""
        pause_s = 0.5
        while True:
            failure: ValueError
            try:
                answer = self._once(method, path, deadline_s, body)
                if answer.status_code == 200:
                    break
                failure = ValueError(self._told(method, path, answer.status_code, answer.text))
                again = answer.status_code in (429, 503)
            except (TimeoutError, httpx2.TimeoutException):
                failure = ValueError(f"{self.url}{path} did not answer in time (rollout.server_timeout_s)")
                again = False
            except httpx2.RequestError as error:
                reason = str(error) or type(error).__name__
                failure, again = NoAnswer(f"no vLLM server answers at {self.url}{path} ({reason})"), True
            if not again or retries == 0 or time.monotonic() + pause_s > deadline_s:
                raise failure
            time.sleep(pause_s)
            pause_s, retries = 2 * pause_s, retries - 1
        text = answer.text
        try:
            return json.loads(text) if text.strip() else None
        except ValueError:
            raise ValueError(f"{self.url}{path} answers {text[:200]!r}, which is not JSON; is it vLLM?") from None

    def _once(self, method: str, path: str, deadline_s: float, body: dict[str, Any] | None) -> httpx2.Response:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        key = os.environ.get("VLLM_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return self.client.request(method, path, json=body, headers=headers, timeout=left_s)

    def _told(self, method: str, path: str, status: int, text: str) -> str:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            text = json.loads(text)["error"]["message"]
        hint = ""
        if status == 404 and path in ("/collective_rpc", "/reset_prefix_cache"):
            hint = "; start it with VLLM_SERVER_DEV_MODE=1, which offers this path"
        elif path == "/collective_rpc":
            hint = "; a reload that fails ends vLLM's engine: look at the server's own messages and start it again"
        return f"the vLLM server at {self.url} answers {method} {path} with {status}: {str(text)[:300]}{hint}"
