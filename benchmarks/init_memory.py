"""Peak memory of `init-student` at the true width of a 7B teacher: measured with few layers, extrapolated to 32.

    python benchmarks/init_memory.py                  # 4 and 8 layers, a quarter of them left out, width halved
    python benchmarks/init_memory.py --layers 2 4 --rows 16

Teachers are LLaMA-7B layers of random bf16 weights, one shard for each layer; the student is that of the recipe
llama_7b_to_1b with 3/4 of the teacher's layers. The command runs in a process of its own, whose peak resident memory
is read, pages of the mapped weight files included. It prints what one more layer of the teacher adds.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from recipes.llama_7b_to_1b import SHAPE_7B  # noqa: E402
from toolkit.data.python_docs import python_docs_rows  # noqa: E402


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = [row["response"] for row in python_docs_rows("validation")]
    words.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=2000, special_tokens=["</s>"], show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(folder)


def write_teacher(folder: Path, layers: int) -> None:
    config = LlamaConfig(**SHAPE_7B | {"num_hidden_layers": layers})
    width, mlp = config.hidden_size, config.intermediate_size
    shapes = dict.fromkeys(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"), (width, width)
    )
    shapes |= {"mlp.gate_proj": (mlp, width), "mlp.up_proj": (mlp, width), "mlp.down_proj": (width, mlp)}
    index = {}

    def write(file: str, parts: dict[str, tuple[int, ...]]) -> None:
        norms = {name for name, shape in parts.items() if len(shape) == 1}
        tensors = {
            name: torch.ones(shape, dtype=torch.bfloat16) if name in norms
            else torch.randn(shape).mul_(0.02).bfloat16()
            for name, shape in parts.items()
        }  # fmt: skip
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(parts, file))

    write("rest.safetensors", {
        "model.embed_tokens.weight": (config.vocab_size, width), "lm_head.weight": (config.vocab_size, width),
        "model.norm.weight": (width,),
    })  # fmt: skip
    for layer in range(layers):
        parts = {f"{name}.weight": shape for name, shape in shapes.items()}
        parts |= {"input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,)}
        write(f"layer-{layer}.safetensors", {f"model.layers.{layer}.{name}": shape for name, shape in parts.items()})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.save_pretrained(folder)
    write_tokenizer(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8], help="of the teachers, in rising order")
    parser.add_argument("--rows", type=int, default=2, help="of calibration text, 256 tokens each")
    options = parser.parse_args()
    peaks = {}
    for layers in options.layers:
        with tempfile.TemporaryDirectory() as temporary:
            teacher, out = Path(temporary) / "teacher", Path(temporary) / "student"
            teacher.mkdir()
            write_teacher(teacher, layers)
            sizes = {"layers": max(1, layers * 3 // 4), "hidden": 2048, "heads": 16, "kv-heads": 16, "mlp": 5504}
            sizes |= {"rows": options.rows, "template": "plain"}
            command = [sys.executable, "-m", "toolkit", "init-student", "--teacher", str(teacher), "--out", str(out)]
            started_s = time.monotonic()
            subprocess.run(
                [*command, *(text for name, value in sizes.items() for text in (f"--{name}", str(value)))], cwd=ROOT,
                check=True, stdout=subprocess.DEVNULL,
            )  # fmt: skip
            seconds = time.monotonic() - started_s
            # ru_maxrss of children is the largest of all so far: teachers come in rising order.
            peaks[layers] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
            size = sum(file.stat().st_size for file in teacher.glob("*.safetensors")) / 2**30
            print(
                f"{layers} layers ({size:.2f} GiB of weights) to {sizes['layers']}: peak {peaks[layers]:.2f} GiB, "
                f"{seconds:.0f} s", flush=True,
            )  # fmt: skip
    if len(peaks) > 1:
        (few, low), *_, (many, high) = sorted(peaks.items())
        slope = (high - low) / (many - few)
        total = SHAPE_7B["num_hidden_layers"]
        print(f"{slope * 1024:.0f} MiB a layer, so {high + slope * (total - many):.1f} GiB for {total} layers")


if __name__ == "__main__":
    main()
