"""Whether text can be generated in the background of training steps on one device: two processes with a student each,
on the same cores or the same GPU, one training and one generating, first each alone and then both at once.

    python benchmarks/overlap.py                                   # a random model, half a minute
    python benchmarks/overlap.py --shape 576,30,9,3,1536,49152     # SmolLM2-135M's

Alone, a process has all cores, as training has in a run. At once, both have all of them, or half each. The gain: how
much more of both kinds of work a second holds when they run at once instead of in turn, (training at once / alone) +
(generation at once / alone). At 1 nothing is gained; 2 would be a device with room for both.
"""

import argparse
import multiprocessing
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def worker(kind: str, options: argparse.Namespace, pipe) -> None:
    """Answers each (seconds, threads) with the units of work done a second: training steps, or generated tokens."""
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, layers, heads, key_heads, inner, vocabulary = options.shape
    shape = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=key_heads,
        intermediate_size=inner, vocab_size=vocabulary, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16 if options.bf16 else torch.float32).to(device)
    work = training(model, options, device) if kind == "train" else generation(model, options)
    work()  # the first time allocates
    pipe.send(None)
    while (asked := pipe.recv()) is not None:
        seconds, threads = asked
        torch.set_num_threads(threads)
        units, started_s = 0.0, time.perf_counter()
        while time.perf_counter() - started_s < seconds:
            units += work()
            if device == "cuda":
                torch.cuda.synchronize()
        pipe.send(units / (time.perf_counter() - started_s))


def training(model, options: argparse.Namespace, device: str):
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids_BT = torch.randint(0, options.shape[-1], (options.rows, options.tokens), device=device)

    def work() -> float:
        model(input_ids=ids_BT, labels=ids_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return 1.0

    return work


def generation(model, options: argparse.Namespace):
    import numpy as np

    from toolkit.models.vocabulary import Vocabulary
    from toolkit.rollout.decode import decode
    from toolkit.rollout.sampling import SeededSampling

    model.eval()
    size = options.shape[-1]
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, size, options.tokens // 2).astype(np.int32) for _ in range(options.rows)]
    sampling = SeededSampling(options.tokens // 2, seeds=range(options.rows))

    def work() -> float:
        return float(decode(model, prompts, sampling, Vocabulary(size, (size,), 0), options.rows)[1].tokens)

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", type=lambda text: [int(part) for part in text.split(",")], default=[64, 2, 4, 2, 128, 1000],
        help="hidden size, layers, heads, key heads, inner size of the MLP, vocabulary",
    )  # fmt: skip
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="of a training row; in generation half are the prompt")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="all of the device's cores")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for kind in ("train", "generate"):
        pipes[kind], theirs = context.Pipe()
        processes.append(context.Process(target=worker, args=(kind, options, theirs), daemon=True))
        processes[-1].start()
    for pipe in pipes.values():
        pipe.recv()

    def rates(*kinds: str, threads: int = options.threads) -> list[float]:
        for kind in kinds:
            pipes[kind].send((options.seconds, threads))
        return [pipes[kind].recv() for kind in kinds]

    half, turns = max(1, options.threads // 2), []
    for _ in range(options.turns):  # in turn: other work on the machine meets all alike
        alone = [*rates("train"), *rates("generate")]
        turns.append([*alone, *rates("train", "generate"), *rates("train", "generate", threads=half)])
    for pipe in pipes.values():
        pipe.send(None)
    for process in processes:
        process.join(10)

    from toolkit.tables import format_table

    middle = [sorted(column)[len(column) // 2] for column in zip(*turns, strict=True)]
    print(format_table(
        ["", "alone", f"at once, {options.threads} threads each", f"at once, {half} each"],
        [["training steps/s", *middle[0::2]], ["generated tokens/s", *middle[1::2]]],
    ))  # fmt: skip
    for name, at in ((f"{options.threads} threads each", 2), (f"{half} each", 4)):
        gains = sorted(turn[at] / turn[0] + turn[at + 1] / turn[1] for turn in turns)
        print(f"gain, {name}: {gains[len(gains) // 2]:.2f} ({gains[0]:.2f} to {gains[-1]:.2f}; 1 is no gain)")


if __name__ == "__main__":
    main()
