"""Tokens per second of generation with and without CUDA graphs, of the shapes of recipes/llama_7b_to_1b.py with random
weights.

    python benchmarks/gpu_generation.py [--device cpu] [--tiny] [--json FILE]

Three ways of `decode`, which differ in the passes over one token a row:

decode            as the toolkit has them: the rows that run, and as much of the cache as the longest of them has
full batch        every row of the cache, also those that nobody reads, and the cache to a multiple of 128 tokens
CUDA graph        the same passes, captured once for each width and played again: no launches by the host

All make the same texts from the same draws; in bf16 some come out differently, as products of other shapes round
otherwise. Prompts have 128 tokens, texts 128 more. What the capture takes is part of the time, and told. "weights,
TB/s" is what reading the weights once a pass takes of the memory's bandwidth, which bounds generation of few rows.
"""

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.gpu_common import Record, parsed, parser_of, shapes, synchronize
from toolkit.batch import round_up
from toolkit.models import Vocabulary
from toolkit.rollout.decode import DecodeStats, Passes, _hidden, decode
from toolkit.rollout.sampling import SeededSampling

WIDTH = 128  # tokens by which the part of the cache grows that a pass of the full batch reads


class FullBatchPasses(Passes):
    """Passes over one token that have the same shapes until the texts pass a multiple of WIDTH. Rows that do not run
    write into places of their own that a later prompt overwrites, and nobody reads what they give."""

    capture_s = 0.0  # of all instances since it was set to 0

    def __init__(self, model: PreTrainedModel, prompts: Sequence[np.ndarray], rows: int, max_new_tokens: int):
        super().__init__(model, prompts, rows, max_new_tokens)
        self.row_R = torch.arange(rows, device=self.device)
        self.ids_R, self.position_R = torch.zeros_like(self.row_R), torch.zeros_like(self.row_R)

    def step(self, ids_B: Tensor, position_B: Tensor, lengths: list[int]) -> Tensor:
        """See `Passes.step`."""
        count, width = len(ids_B), min(self.room, round_up(max(lengths), WIDTH))
        self.ids_R[:count] = ids_B
        self.position_R[:count] = position_B
        return self.whole_step(width)[:count]

    def whole_step(self, width: int) -> Tensor:
        """hidden_RH of every row, in places that stay the same."""
        self.cache.start_pass(self.row_R, self.position_R, [width] * len(self.row_R), is_prompt=False)
        return _hidden(self.model, self.cache, self.ids_R, self.position_R)


class GraphPasses(FullBatchPasses):
    """The same, captured once for each width."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def whole_step(self, width: int) -> Tensor:
        """The graph's own output, which its next replay overwrites."""
        if width not in self.graphs:
            started_s = time.perf_counter()
            self.graphs[width] = self._captured(width)
            FullBatchPasses.capture_s += time.perf_counter() - started_s
        graph, hidden_RH = self.graphs[width]
        # Rows that end are moved by what the cache was told of the pass.
        self.cache.start_pass(self.row_R, self.position_R, [width] * len(self.row_R), is_prompt=False)
        graph.replay()
        return hidden_RH

    def _captured(self, width: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # Once outside of the graph, for what is made at first use. A pass may be repeated: it writes the same again.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            super().whole_step(width)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            hidden_RH = super().whole_step(width)
        return graph, hidden_RH


PATHS: dict[str, type[Passes]] = {"decode": Passes, "full batch": FullBatchPasses, "CUDA graph": GraphPasses}


def make_model(shape: dict, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """Random weights, made on the device."""
    shape = dict(shape)
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


class Case:
    """A model's texts after prompts of random ids, on one path or another."""

    def __init__(self, name: str, model: PreTrainedModel, rows: int, prompt_tokens: int, new_tokens: int):
        self.name, self.model, self.rows, self.new_tokens = name, model, rows, new_tokens
        draw, size = np.random.default_rng(0), model.config.vocab_size
        lengths = prompt_tokens - np.arange(rows) % max(1, prompt_tokens // 4)  # of so many tokens and somewhat fewer
        self.prompts = [draw.integers(3, size, length).astype(np.int32) for length in lengths]
        self.reference: list[np.ndarray] | None = None  # what the first path said

    def run(self, path: str, new_tokens: int) -> tuple[list[np.ndarray], DecodeStats, float]:
        """Texts, counts, and seconds."""
        device, vocabulary = self.model.device.type, Vocabulary(self.model.config.vocab_size, (2,), 2)
        sampling = SeededSampling(new_tokens, seeds=range(self.rows))
        synchronize(device)
        started_s = time.perf_counter()
        texts, stats = decode(self.model, self.prompts, sampling, vocabulary, self.rows, passes_of=PATHS[path])
        synchronize(device)
        return texts, stats, time.perf_counter() - started_s

    def measure(self, path: str, repeats: int) -> dict:
        """The figures of a path, after one short call that does not count."""
        self.run(path, min(4, self.new_tokens))
        FullBatchPasses.capture_s, seconds = 0.0, []
        for _ in range(repeats):
            texts, stats, elapsed_s = self.run(path, self.new_tokens)
            seconds.append(elapsed_s)
        self.reference = self.reference or texts
        same = sum(np.array_equal(a, b) for a, b in zip(texts, self.reference, strict=True))
        passes, elapsed_s = stats.steps + stats.prefills, statistics.median(seconds)
        weights = sum(p.nbytes for p in self.model.parameters())
        return {
            "tokens_per_s": stats.tokens / elapsed_s, "ms_per_pass": 1e3 * elapsed_s / passes,
            "weights_tb_per_s": weights * passes / elapsed_s / 1e12, "capture_s": FullBatchPasses.capture_s / repeats,
            "same_texts": same / self.rows, "tokens": stats.tokens,
        }  # fmt: skip


def measured(case: Case, path: str, repeats: int) -> dict:
    """A line of the table, or why there is none."""
    line = {"model": case.name, "rows": case.rows, "path": path}
    if path == "CUDA graph" and case.model.device.type != "cuda":
        return line | {"failure": "needs a GPU"}
    try:
        return line | case.measure(path, repeats)
    except Exception as error:  # an experiment: the other figures are still wanted
        return line | {"failure": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}


HEADERS = ["model", "rows", "path", "tokens/s", "x decode", "ms a pass", "weights, TB/s", "capture s", "same texts"]
FIGURES = ("ms_per_pass", "weights_tb_per_s", "capture_s", "same_texts")


def tell(record: Record, lines: list[dict], path: str) -> None:
    """The table of one path beside the first one."""
    rates = {(line["model"], line["rows"]): line.get("tokens_per_s") for line in lines if line["path"] == "decode"}
    found = [line for line in lines if line["path"] == path]
    rows = []
    for line in found:
        if "failure" not in line:
            base, rate = rates[line["model"], line["rows"]], line["tokens_per_s"]
            shown = (line["model"], line["rows"], path, rate, rate / base if base else None)
            rows.append([*shown, *(line[name] for name in FIGURES)])
    if rows:
        record.table(HEADERS, rows)
    if failed := [line for line in found if "failure" in line]:
        record.say("\n".join(f"- {line['model']}, {line['rows']} rows, {path}: {line['failure']}" for line in failed))


def main() -> None:
    options = parsed(parser_of(__doc__))
    record, lines = Record(options.json), []
    teacher, student = shapes(options.tiny)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    plan = [("student", student, (8, 32, 128)), ("teacher", teacher, (32,))]
    prompt_tokens, new_tokens, repeats = 128, 128, 2
    if options.tiny:
        plan = [("student", student, (3,)), ("teacher", teacher, (2,))]
        prompt_tokens, new_tokens, repeats = 9, 6, 1
    cases = []
    for name, shape, sizes in plan:
        model = make_model(shape, options.device, dtype)
        cases += [Case(name, model, rows, prompt_tokens, new_tokens) for rows in sizes]
    # Graphs come last: what breaks there may leave the device unusable for this process.
    for path in PATHS:
        for case in cases:
            lines.append(measured(case, path, repeats))
            record.keep(paths=lines)
        tell(record, lines, path)


if __name__ == "__main__":
    main()
