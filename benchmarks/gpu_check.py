"""All that only a GPU can show, one part after the other, each in a process and under a time limit of its own.

    benchmarks/gpu_check.sh --from WHEELS --out gpu_check        # through the script, on the GPU's machine
    python benchmarks/gpu_check.py --tiny --device cpu           # tiny shapes anywhere: whether every part runs

Writes OUT/gpu_check.md (tables) and OUT/gpu_check.json (all numbers) anew after every part, and beside them a log of
each part. A part that fails, or is stopped at its limit, is told with what it had by then, and the next one begins.
Exits with 1 where any part did not end well. docs/gpu.md says what each part measures.

This file needs nothing but Python: what the machine lacks is unpacked from the wheels first.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / "benchmarks" / "gpu_requirements.txt"
LOG_LINES = 12  # of a part that did not end well


class Part(NamedTuple):
    """A program whose stdout is Markdown, and which writes its numbers to the file that follows `--json`."""

    name: str
    title: str
    limit_s: float
    command: list[str]  # after the interpreter; "" stands for the JSON file
    is_markdown: bool = True  # otherwise it is shown as it is


def parts(device: str, tiny: bool) -> list[Part]:
    """In the order of what is most missed. The limits add up to less than 8 minutes."""
    common = ["--device", device, *(["--tiny"] if tiny else []), "--json", ""]
    steps = ["benchmarks/gpu_steps.py", *common, "--layout"]
    loss = ["benchmarks/loss.py", "--device", device, "--columns", "ours,products,plain", "--json", ""]
    if tiny:
        loss += ["--shape", "64,320,16,24", "--divergence", "skl", "--parts", "time,errors", "--repeats", "1"]
        loss += ["--dtype", "fp32", "--backend", "torch"]
    else:
        loss += ["--divergence", "skl,srkl,fkl,rkl,jsd", "--parts", "time,memory,errors", "--repeats", "3"]
    # A GPU's tests are skipped without one, and then -k asks for few of them.
    tests = ["-m", "pytest", "tests/divergences/test_cuda.py", "-vv", "-p", "no:cacheprovider", "--durations=0"]
    tests += ["-k", "stored"] if tiny else []
    return [
        Part("machine", "Machine", 25, ["benchmarks/gpu_machine.py", *common]),
        Part("steps-resident", "Whole steps, both models resident", 85, [*steps, "resident"]),
        Part("steps-sharded", "Whole steps, both models sharded (ZeRO-3)", 75, [*steps, "sharded"]),
        Part("loss", "The loss", 105, loss),
        Part("generation", "Generation", 60, ["benchmarks/gpu_generation.py", *common]),
        Part("rows", "Row kernels: experiments", 55, ["benchmarks/gpu_rows.py", *common]),
        Part("tests", "Tests on the GPU", 60, tests, is_markdown=False),
    ]


# ------------------------------------------------------------------------------------------------- packages


def missing_packages() -> list[str]:
    """Those of gpu_requirements.txt that are not here in any version, as NAME==VERSION."""
    lines = [line.strip() for line in REQUIREMENTS.read_text().splitlines()]
    return [line for line in lines if line and not line.startswith("#") and not _is_here(line.partition("==")[0])]


def _is_here(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def install_missing(wheels: Path, target: Path) -> list[str]:
    """Unpacks what is missing from the folder `wheels` into `target`; nothing is fetched, and nothing that the machine
    has is replaced. Returns what was installed. Raises SystemExit with pip's words where a wheel does not fit."""
    wanted = missing_packages()
    if wanted:
        command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-index"]
        command += ["--no-deps", "--no-compile", "--find-links", str(wheels), "--target", str(target), *wanted]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(
                f"gpu_check: {len(wanted)} packages are missing here and could not be installed from {wheels}; fetch "
                f"them for Python {sys.version_info.major}.{sys.version_info.minor} with benchmarks/gpu_check.sh "
                f"--wheels on a machine with a network\n{done.stderr[-2000:]}"
            )
    return wanted


# ------------------------------------------------------------------------------------------------- running


def run_part(part: Part, out: Path, limit_s: float, environment: dict[str, str]) -> dict:
    """What became of the part: `status` is "ok", "failed" or "stopped", `numbers` its JSON as far as it was written,
    `markdown` its stdout. It is stopped after `limit_s`, with every process that it has started."""
    files = {suffix: out / f"{part.name}.{suffix}" for suffix in ("json", "md", "log")}
    files["json"].unlink(missing_ok=True)
    command = [sys.executable, *(word or str(files["json"]) for word in part.command)]
    started_s = time.monotonic()
    with files["md"].open("w") as stdout, files["log"].open("w") as stderr:
        # In a session of its own, so that it goes with all processes below it.
        child = subprocess.Popen(
            command, cwd=ROOT, stdout=stdout, stderr=stderr, env=environment, start_new_session=True
        )
        try:
            code = child.wait(timeout=limit_s)
            status = "ok" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            code, status = None, "stopped"
        finally:
            with contextlib.suppress(ProcessLookupError):  # nothing is left of it
                os.killpg(child.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold on to it
                child.wait(10)
    found = {
        "part": part.name, "status": status, "exit_code": code, "seconds": time.monotonic() - started_s,
        "limit_s": limit_s, "command": command, "numbers": _json_of(files["json"]),
        "markdown": files["md"].read_text(errors="replace"),
    }  # fmt: skip
    if status != "ok":
        found["log"] = files["log"].read_text(errors="replace").splitlines()[-LOG_LINES:]
    return found


def _json_of(file: Path) -> object:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):  # not written, or not to its end
        return None


def run_all(chosen: list[Part], out: Path, budget_s: float, environment: dict[str, str], heading: dict) -> list[dict]:
    """Runs the parts, and writes the report after each. Parts for which no time is left are told as skipped."""
    ends_s, found = time.monotonic() + budget_s, []
    for part in chosen:
        left_s = ends_s - time.monotonic()
        if left_s < min(5.0, part.limit_s):
            found.append({"part": part.name, "status": "skipped", "seconds": 0.0, "limit_s": 0.0, "markdown": ""})
        else:
            print(f"gpu_check: {part.name}, at most {min(part.limit_s, left_s):.0f} s", file=sys.stderr, flush=True)
            found.append(run_part(part, out, min(part.limit_s, left_s), environment))
        write_report(out, heading, chosen, found)
    return found


# ------------------------------------------------------------------------------------------------- report


def write_report(out: Path, heading: dict, chosen: list[Part], found: list[dict]) -> None:
    """Both files, each replaced as a whole."""
    for name, text in (
        ("gpu_check.json", json.dumps({"heading": heading, "parts": found}, indent=1)),
        ("gpu_check.md", report(heading, chosen, found)),
    ):
        unfinished = out / f"{name}.new"
        unfinished.write_text(text)
        unfinished.replace(out / name)


def report(heading: dict, chosen: list[Part], found: list[dict]) -> str:
    """The tables of all parts so far, and a last one of how each ended."""
    by_name = {part.name: part for part in chosen}
    lines = ["# GPU check", "", f"{heading['date']}, `{heading['command']}`", ""]
    if heading["installed"]:
        lines += [f"Installed from wheels beside what the machine has: {', '.join(heading['installed'])}.", ""]
    for result in found:
        part = by_name[result["part"]]
        lines += [f"## {part.title}", ""]
        if result["status"] != "ok":
            lines += [f"**{how_it_ended(result)}**", ""]
        if part.is_markdown:
            lines += [result["markdown"].strip(), ""]
        else:
            lines += [counted_tests(result["markdown"]), ""]
        if result.get("log"):
            lines += ["```", *result["log"], "```", ""]
    lines += ["## Parts", "", "| part | ended | seconds | limit |", "| --- | --- | ---: | ---: |"]
    for result in found:
        times = f"{result['seconds']:.0f} | {result['limit_s']:.0f}"
        lines.append(f"| {result['part']} | {how_it_ended(result)} | {times} |")
    return "\n".join(lines) + "\n"


def how_it_ended(result: dict) -> str:
    """In words."""
    return {
        "ok": "ok",
        "failed": f"failed with exit code {result.get('exit_code')}",
        "stopped": f"stopped at its limit of {result['limit_s']:.0f} s; what it had by then is here",
        "skipped": "skipped, as the time of the whole was up",
    }[result["status"]]


def counted_tests(text: str) -> str:
    """How many of pytest's tests ran and how they ended, also where it was stopped on the way; and which failed."""
    outcomes = re.findall(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)", text, re.M)
    collected = re.search(r"collected (\d+) items(?: / (\d+) deselected)?", text)
    wanted = int(collected[1]) - int(collected[2] or 0) if collected else 0
    counts = {name: sum(end == name for _, end in outcomes) for name in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    said = ", ".join(f"{count} {name.lower()}" for name, count in counts.items() if count)
    lines = [f"{len(outcomes)} of {wanted} tests ran: {said or 'none ended'}."]
    lines += [f"- {end.lower()}: `{name}`" for name, end in outcomes if end in ("FAILED", "ERROR")]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------- main


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="wheels", type=Path, help="folder that gpu_check.sh --wheels has filled")
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder of the report")
    parser.add_argument("--minutes", type=float, default=8.0, help="of all parts together")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in parts("cuda", False)])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: whether every part runs, and no figures")
    parser.add_argument("--relative-to", type=Path, default=Path(), help=argparse.SUPPRESS)
    return parser.parse_args()


def part_environment(device: str, target: Path) -> dict[str, str]:
    """Of a part's process: the checkout, what was installed, and where compiled kernels are kept."""
    paths = [str(ROOT), str(target), os.environ.get("PYTHONPATH", "")]
    found = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    found |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if device == "cpu":
        found |= {"DS_ACCELERATOR": "cpu", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return found


def _without_folder(arguments: list[str]) -> list[str]:
    """What the user typed: the script adds where it was called."""
    return arguments[2:] if arguments[:1] == ["--relative-to"] else arguments


def main() -> None:
    options = parse_arguments()
    began_s = time.monotonic()
    out = options.relative_to / options.out
    out.mkdir(parents=True, exist_ok=True)
    chosen = [part for part in parts(options.device, options.tiny) if not options.only or part.name in options.only]
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as target:
        wheels = options.wheels and options.relative_to / options.wheels
        heading = {
            "date": time.strftime("%Y-%m-%d"),
            "command": " ".join(["benchmarks/gpu_check.sh", *_without_folder(sys.argv[1:])]),
            "installed": install_missing(wheels, Path(target)) if wheels else [],
        }
        environment = part_environment(options.device, Path(target))
        budget_s = 60 * options.minutes - (time.monotonic() - began_s)
        found = run_all(chosen, out.resolve(), budget_s, environment, heading)
    print((out / "gpu_check.md").read_text())
    sys.exit(any(result["status"] != "ok" for result in found))


if __name__ == "__main__":
    main()
