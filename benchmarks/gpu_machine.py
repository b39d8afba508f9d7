"""The machine of gpu_check.py: card, driver, versions beside those of requirements.txt, and the speed of its products
and copies, by which every other figure is to be read.

    python benchmarks/gpu_machine.py [--device cpu] [--tiny] [--json FILE]
"""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.gpu_common import Record, parsed, parser_of, peak_tflops, synchronize

NAMED = ("torch", "triton", "transformers", "deepspeed", "accelerate", "numpy", "huggingface-hub", "tokenizers")


def pinned() -> dict[str, str]:
    """Package -> what requirements.txt asks for."""
    lines = Path(__file__).resolve().parents[1].joinpath("requirements.txt").read_text().splitlines()
    words = [line.split(";")[0].strip() for line in lines if line and not line.startswith("#")]
    return {word.replace(">", "=").partition("=")[0]: word for word in words}


def here(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


#: other versions of transformers that were tried, by their first two numbers: what works with them and what does not
TRIED = {
    "5.17": "LLaMA-like models load, train, pack, generate and are exported as with 5.24, which is all this check "
    "needs. Refused with a message: sentencepiece tokenizers without a tokenizer.json (LLaMA, mT5), those of GGUF "
    "files, and packing Falcon. Packing OPT fails: create_causal_mask has no argument `cache` there."
}


def about_transformers(version: str | None, tested: str) -> str:
    """What the project can do with this version."""
    if version == tested:
        return f"transformers {version} is the version that the project is tested with."
    tried = TRIED.get(".".join((version or "").split(".")[:2]), "This version was never tried.")
    return f"transformers is {version} here, and the project is tested with {tested}. {tried}"


def driver() -> str | None:
    """What nvidia-smi says: driver, clocks and power limit."""
    fields = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def best_seconds(work: Callable[[], object], device: str, repeats: int = 10) -> float:
    """The shortest of several runs after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        started_s = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - started_s)
    return min(times[1:])


def speeds(device: str, size: int) -> tuple[float, float]:
    """(TFLOP/s of a bf16 product [size, size] x [size, size], TB/s read and written of a copy of 16 such matrices)."""
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    source: Tensor = torch.empty(16 * size, size, dtype=torch.bfloat16, device=device).fill_(1)
    target = torch.empty_like(source)
    product_s = best_seconds(lambda: a @ b, device)
    copy_s = best_seconds(lambda: target.copy_(source), device)
    return 2 * size**3 / product_s / 1e12, 2 * source.nbytes / copy_s / 1e12


def main() -> None:
    options = parsed(parser_of(__doc__))
    record, device = Record(options.json), options.device
    card = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
    memory = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else None
    asked = pinned()
    versions = {name: here(name) for name in NAMED}
    record.keep(
        card=card, memory_bytes=memory, driver=driver(), cuda=torch.version.cuda, cores=os.cpu_count(),
        python=platform.python_version(), versions=versions, pinned={name: asked.get(name) for name in NAMED},
        data_sheet_tflops=peak_tflops(card),
    )  # fmt: skip
    gib = "" if memory is None else f", {memory / 2**30:.0f} GiB"
    record.say(
        f"{card}{gib}; driver, clocks, power limit: {record.numbers['driver'] or 'unknown'}; CUDA "
        f"{torch.version.cuda or 'none'}, {os.cpu_count()} cores, Python {platform.python_version()}."
    )
    record.table(
        ["package", "here", "requirements.txt"],
        [[name, version, asked.get(name)] for name, version in versions.items()],
    )
    record.say(about_transformers(versions["transformers"], asked["transformers"].partition("==")[2]))
    tflops, tbytes = speeds(device, 64 if options.tiny else 8192)
    record.keep(product_tflops=tflops, copy_tb_per_s=tbytes)
    record.table(
        ["bf16 product, TFLOP/s", "data sheet, TFLOP/s", "copy, TB/s read and written"],
        [[tflops, record.numbers["data_sheet_tflops"], tbytes]],
    )


if __name__ == "__main__":
    main()
