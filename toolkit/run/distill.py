"""The Python way in: a run in this process, alone or as one of a launcher's ranks."""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from toolkit.ranks import collectives, launch
from toolkit.ranks.watchdog import Watchdog
from toolkit.run.build import checked
from toolkit.run.run import run
from toolkit.run.summary import Summary
from toolkit.settings import FaultsConfig, RunConfig
from toolkit.settings.methods import with_method
from toolkit.storage.lock import sole_use


@dataclass(frozen=True)
class Distilled:
    """What a run leaves behind."""

    summary: Summary  # also in summary.json of the run's folder
    student: Path  # a Hugging Face folder


def distill(config: RunConfig | Mapping[str, Any]) -> Distilled:
    """Train the student of `config` and export it; goes on with a run of this name that was stopped, as `resume` says.

    config: a RunConfig, or settings by name as on the command line: {"method": "gkd", "teacher.path": "...", ...}.
    Started by a launcher (deepspeed, torchrun, srun), every rank has to call it. A process that no launcher started
    trains alone, and leaves its process group and signal handlers as they were.

    Raises ValueError for wrong input and a run that cannot go on, `toolkit.GoOnLater` where SIGINT, SIGTERM or SIGUSR1
    stopped the run after a checkpoint: the same call goes on from there.
    """
    return distill_as(lambda: as_config(config))


def distill_as(read: Callable[[], RunConfig], is_stage: bool = False) -> Distilled:
    """As `distill`, for settings that `read` returns, or refuses with ValueError, once the ranks have joined.

    is_stage: the folder above the run's is that of stages, and no other job may work there meanwhile.
    """
    with ready(lambda: read().faults.hang_s) as watchdog:
        config = collectives.together(lambda: checked(read()))
        with sole_use(config.run_dir.parent) if is_stage else nullcontext():
            summary = run(config, watchdog)
    return Distilled(summary, Path(summary["student"]))


def as_config(config: RunConfig | Mapping[str, Any]) -> RunConfig:
    """`config`, or one of settings by name, of which "method" comes first. Raises ValueError for an unknown setting."""
    if isinstance(config, RunConfig):
        return config
    settings = {name: str(value) if isinstance(value, os.PathLike) else value for name, value in config.items()}
    method = settings.pop("method", None)
    return RunConfig().with_settings(settings) if method is None else with_method(RunConfig(), method, settings)


@contextmanager
def ready(hang_s: Callable[[], float]) -> Iterator[Watchdog]:
    """Inside the `with` block this process is a rank, watched for hangs, and libraries keep quiet.

    hang_s: the watchdog's limit. Where it raises ValueError, of settings that are wrong, the default one is taken: they
    are refused once all ranks are there, and told by one of them.
    """
    try:
        limit_s = hang_s()
    except ValueError:
        limit_s = FaultsConfig.hang_s
    had_bars = transformers.utils.logging.is_progress_bar_enabled()
    with warnings.catch_warnings(), Watchdog(limit_s) as watchdog, launch.joined(limit_s):
        quiet_libraries()
        try:
            yield watchdog
        finally:
            if had_bars:
                transformers.utils.logging.enable_progress_bar()


def quiet_libraries() -> None:
    """No warnings about what deepspeed calls in torch, no bars over weight shards: a run's own lines stay readable."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    transformers.utils.logging.disable_progress_bar()
