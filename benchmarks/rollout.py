"""Tokens per second of generation, side by side in one run: the toolkit's rollout, transformers' generate through
ZeRO-3 hooks, and on a dense copy generate and continuous batching (`generate_batch`).

    deepspeed --num_accelerators 2 benchmarks/rollout.py --model FOLDER

Texts end at ragged lengths: besides the real EOS, every id that is a multiple of --end_every counts as one, for all
paths alike. Each path answers the same prompts; tokens are counted up to and including the end. Continuous batching has
a key-value cache for all rows at once, and its set-up, like the toolkit's gather, is part of its time.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import deepspeed
import numpy as np
import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from toolkit.models import choose_dtype, load_model
from toolkit.models.vocabulary import Vocabulary
from toolkit.ranks import collectives, launch
from toolkit.rollout.local import GatheredRollout, SeededSampling
from toolkit.settings import ModelConfig
from toolkit.tables import format_table


class Wrapped(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids_BT):
        return self.model(input_ids=ids_BT).logits


def generate(model, prompts, new_tokens, ends, synced):
    """Tokens that `model.generate` makes up to each row's end, left-padded as its documentation asks."""
    width = max(map(len, prompts))
    ids_BT = torch.tensor([[ends[0]] * (width - len(p)) + p.tolist() for p in prompts]).to(model.device)
    mask_BT = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]).to(model.device)
    out = model.generate(
        ids_BT, attention_mask=mask_BT, max_new_tokens=new_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        eos_token_id=ends, pad_token_id=ends[0], synced_gpus=synced,
    )[:, width:]  # fmt: skip
    is_end = torch.isin(out, torch.tensor(ends, device=out.device))
    return int(torch.where(is_end.any(1), is_end.int().argmax(1) + 1, out.shape[1]).sum())


def generate_batch(model, prompts, new_tokens, ends, page=64):
    """Tokens that continuous batching makes. Raises RuntimeError where a request fails."""
    longest = max(map(len, prompts)) + new_tokens
    found = model.generate_batch(
        [prompt.tolist() for prompt in prompts],
        generation_config=GenerationConfig(
            max_new_tokens=new_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=ends,
            pad_token_id=ends[0],
        ),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=page, num_blocks=len(prompts) * -(-longest // page), max_batch_tokens=max(256, 8 * len(prompts))
        ),
    )  # fmt: skip
    if failed := [text.error for text in found.values() if text.error]:
        raise RuntimeError(f"continuous batching: {failed[0]}")
    return sum(len(text.generated_tokens) for text in found.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--rows", type=int, default=32, help="prompts of each rank")
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--end_every", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="as in a run")
    parser.add_argument("--without_continuous", action="store_true", help="continuous batching is the slowest of all")
    parser.add_argument("--local_rank", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    launch.start()
    dtype = choose_dtype(options.precision, collectives.device())
    ds_config = {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 10000},
        "train_micro_batch_size_per_gpu": 1, "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True, "bf16": {"enabled": dtype == torch.bfloat16},
    }  # fmt: skip
    sharded = load_model(ModelConfig(path=options.model), options.model, ds_config, dtype)
    wrapped = Wrapped(sharded)
    engine, *_ = deepspeed.initialize(
        model=wrapped, optimizer=torch.optim.SGD(wrapped.parameters(), lr=0.0), config=ds_config
    )
    sharded.config.use_cache = True
    dense = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval().to(collectives.device())
    size = dense.config.vocab_size
    ends = [dense.config.eos_token_id, *range(options.end_every, size, options.end_every)]
    rng = np.random.default_rng(collectives.rank())
    prompts = [rng.integers(3, size, rng.integers(16, 65)).astype(np.int32) for _ in range(options.rows)]
    rollout = GatheredRollout(engine, Vocabulary(size, tuple(ends), ends[0]), gather="always")
    sampling = SeededSampling(options.new_tokens, seeds=range(options.rows))

    def ours():
        return sum(len(example.response) for example in rollout.complete(prompts, sampling))

    def hooked():
        engine.module.eval()
        return generate(sharded, prompts, options.new_tokens, ends, synced=True)

    def plain():
        return generate(dense, prompts, options.new_tokens, ends, synced=False)

    def continuous():
        return generate_batch(dense, prompts, options.new_tokens, ends)

    paths = {
        "toolkit rollout": ours,
        "generate, dense copy": plain,
        "continuous batching, dense copy": continuous,
        "generate, ZeRO-3 hooks": hooked,
    }
    if options.without_continuous:
        del paths["continuous batching, dense copy"]
    rates = {name: [] for name in paths}
    with torch.no_grad():
        for repeat in range(options.repeats):  # in turn: other work on the machine meets all paths alike
            for name, path in paths.items():
                torch.distributed.barrier()
                started_s = time.perf_counter()
                (tokens,) = collectives.sum_over_ranks([path()])  # also the wait for the slower rank
                rates[name].append(tokens / (time.perf_counter() - started_s))
                if collectives.rank() == 0:
                    print(f"repeat {repeat}  {name}: {rates[name][-1]:.1f} tokens/s", flush=True)
    if collectives.rank() == 0:
        middle = {name: float(np.median(values)) for name, values in rates.items()}
        rows = [[name, rate, middle["toolkit rollout"] / rate] for name, rate in middle.items()]
        print(f"{str(dtype).removeprefix('torch.')}, the middle of {options.repeats} repeats")
        print(format_table(["path", "tokens/s, both ranks", "toolkit is faster by"], rows))
    launch.stop()


if __name__ == "__main__":
    main()
