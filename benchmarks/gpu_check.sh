#!/usr/bin/env bash
# What only a GPU can show, in at most 8 minutes on one GPU of 80 GB or more (docs/gpu.md):
#
#     benchmarks/gpu_check.sh --wheels DIR [3.12]     on a machine with a network: fetch what the other one lacks, for its
#                                                     version of Python
#     benchmarks/gpu_check.sh --from DIR [options]    on the GPU's machine, which has torch, triton and transformers
#     benchmarks/gpu_check.sh --help                  the options
#
# PYTHON names the interpreter, python3 by default.
set -euo pipefail
caller_dir="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
sources="deepspeed|hjson|rouge-score" # these come as source alone; DS_BUILD_OPS=0 makes a wheel for any machine of deepspeed

fetch() {
    local folder="$1" version="$2" platform
    local platforms=()
    # pip takes each of these by name alone, and a wheel is named after any of them.
    for platform in manylinux1 manylinux2014 manylinux_2_17 manylinux_2_24 manylinux_2_26 manylinux_2_27 manylinux_2_28; do
        platforms+=(--platform "${platform}_x86_64")
    done
    grep -Ev "^#|^($sources)==" benchmarks/gpu_requirements.txt >"$folder/binary.txt"
    grep -E "^($sources)==" benchmarks/gpu_requirements.txt >"$folder/source.txt"
    "$python" -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --implementation cp \
        --python-version "$version" "${platforms[@]}" -d "$folder" -r "$folder/binary.txt"
    DS_BUILD_OPS=0 "$python" -m pip wheel -q --disable-pip-version-check --no-deps -w "$folder" -r "$folder/source.txt"
    rm "$folder/binary.txt" "$folder/source.txt"
    echo "$(find "$folder" -name '*.whl' | wc -l) wheels in $folder for Python $version: $(du -sh "$folder" | cut -f1)"
}

if [[ "${1:-}" == --wheels ]]; then
    [[ $# -ge 2 ]] || { echo "gpu_check.sh: --wheels needs a folder" >&2; exit 2; }
    folder="$(cd "$caller_dir" && mkdir -p "$2" && cd "$2" && pwd)"
    fetch "$folder" "${3:-3.12}"
else
    exec "$python" benchmarks/gpu_check.py --relative-to "$caller_dir" "$@"
fi
