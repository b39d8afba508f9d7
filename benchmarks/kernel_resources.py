"""What the compiler says about the Triton kernel, without a GPU:  python benchmarks/kernel_resources.py [--json FILE]

Compiles the row kernel ahead of time for sm_80, sm_90 and sm_100 and reads registers, spilled bytes and shared memory
from the assembler's own report (`cuobjdump --dump-resource-usage`). "every option" is temperature, soft caps, biases,
weights and a cross-entropy share together.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toolkit.divergences.kernels.rows import CODES
from toolkit.divergences.kernels.rows_triton import BLOCK_COLUMNS, WARPS, block_columns, rows_kernel

ARCHITECTURES = (80, 90, 100)
WITH_EVERY_OPTION = ("none", "skl", "srkl", "jsd", "akl", "taid")
POINTERS = dict(
    student_ptr="*fp32", teacher_ptr="*fp32", out_ptr="*bf16", state_ptr="*fp32", alpha_ptr="*fp32",
    weights_ptr="*fp32", targets_ptr="*i64", threshold_ptr="*fp32", student_bias_ptr="*fp32", teacher_bias_ptr="*fp32",
)  # fmt: skip
INTEGERS = ("student_stride", "teacher_stride", "out_stride", "state_stride", "first_column", "columns")
FLOATS = (
    "student_scale",
    "student_cap",
    "teacher_scale",
    "teacher_cap",
    "temperature",
    "cross_entropy_weight",
    "a",
    "b",
)


def resources(name: str, every_option: bool, architecture: int) -> dict:
    """Of one variant: registers a thread, spilled bytes (stack or local memory), shared bytes a block."""
    has_teacher = name not in ("none", "top_k")
    flags = ("COOLED", "HAS_WEIGHTS", "HAS_TARGETS", "CROSS_ENTROPY", "STUDENT_BIAS", "TEACHER_BIAS", "STUDENT_CAP")
    constants = dict.fromkeys((*flags, "TEACHER_CAP"), every_option) | dict(
        CODE=CODES[name],
        HAS_TEACHER=has_teacher,
        STATISTICS=True,
        SUMS=has_teacher,
        GRADIENT=True,
        BLOCK=block_columns(CODES[name]),
    )
    kinds = POINTERS | dict.fromkeys(INTEGERS, "i32") | dict.fromkeys(FLOATS, "fp32")
    signature = {x: kinds.get(x, "constexpr") for x in rows_kernel.arg_names}
    aligned = [x for x in rows_kernel.arg_names if x.endswith(("_ptr", "_stride"))]
    attributes = {(rows_kernel.arg_names.index(x),): [["tt.divisibility", 16]] for x in aligned}
    constants = {(rows_kernel.arg_names.index(x),): value for x, value in constants.items()}
    source = ASTSource(rows_kernel, signature, constants, attributes)
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": WARPS})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [str(tool), "--dump-resource-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", report)}
    return {
        "divergence": name, "options": "every option" if every_option else "plain", "architecture": architecture,
        "registers": found["REG"], "spilled_bytes": found["STACK"] + found["LOCAL"],
        "shared_bytes": max(found["SHARED"], compiled.metadata.shared),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    file = parser.parse_args().json
    variants = [(name, False) for name in CODES] + [(name, True) for name in WITH_EVERY_OPTION]
    rows = [resources(*variant, architecture) for variant in variants for architecture in ARCHITECTURES]
    print(f"{BLOCK_COLUMNS} columns a step (taid: half), {WARPS} warps.")
    print("Registers a thread, spilled bytes, shared bytes a block:\n")
    print("| divergence | options | " + " | ".join(f"sm_{x}" for x in ARCHITECTURES) + " |")
    print("| --- | --- |" + " --- |" * len(ARCHITECTURES))
    for i in range(0, len(rows), len(ARCHITECTURES)):
        some = rows[i : i + len(ARCHITECTURES)]
        cells = (f"{x['registers']}, {x['spilled_bytes']}, {x['shared_bytes']}" for x in some)
        print(f"| {some[0]['divergence']} | {some[0]['options']} | " + " | ".join(cells) + " |")
    if file:
        file.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
