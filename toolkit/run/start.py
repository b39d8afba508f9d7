"""Where a run begins: at its first step, at a checkpoint of an earlier start, or nowhere, since it is finished."""

import shutil
from pathlib import Path
from typing import NamedTuple, cast

import yaml

from toolkit.models.identity import RunIdentity
from toolkit.ranks import collectives
from toolkit.ranks.output import say
from toolkit.rollout.schedule import ScheduleState
from toolkit.run.checkpoint import Checkpoint, Checkpoints, compare
from toolkit.run.sharding import as_before
from toolkit.run.state import LoopState
from toolkit.run.summary import BEST, STUDENT, SUMMARY, Summary
from toolkit.settings import RunConfig
from toolkit.storage.manifest import read_json

CONFIG = "config.yaml"


class Start(NamedTuple):
    """The state that a run begins with, and the checkpoint that holds the rest of it; None: from the first step."""

    state: LoopState
    checkpoint: Checkpoint | None
    notes: list[str]  # what the user should know of this choice
    config: RunConfig  # the run's, which keeps what the checkpoint's run had chosen where the settings leave it open


def find_start(config: RunConfig, checkpoints: Checkpoints, identity: RunIdentity) -> Start:
    """The newest whole checkpoint, unless resume is "never". Collective.

    identity: what the run would be made of now. Raises ValueError where the checkpoint's run was made of something else
    or had other settings, and where there are checkpoints and none is whole.
    """
    fresh = LoopState(ScheduleState(config.schedule.phi_initial))
    if config.resume == "never":
        return Start(fresh, None, [], config)
    found, passed_over = checkpoints.newest()
    notes = [f"warning: {text}; an older checkpoint is used" for text in passed_over]
    if found is None:
        return Start(fresh, None, notes, config)
    config = collectives.together(lambda: as_before(config, found.state["config"]))
    changes = collectives.together(lambda: compare(found.state, config, identity))
    notes.append(f"goes on from {found.folder}, written by {found.world} ranks")
    notes += [f"changed since then: {change}" for change in changes]
    return Start(LoopState.from_json(found.state), found, notes, config)


def finished(config: RunConfig, start: Start, identity: RunIdentity) -> Summary | None:
    """The summary of a run that has nothing left to do; None for any other. Collective.

    A finished run does not need its checkpoints: without them its summary says which run it was. Raises ValueError
    where that is another one than this.
    """
    run_dir = config.run_dir
    files = [run_dir / name for name in (SUMMARY, CONFIG, f"{STUDENT}/config.json")]
    if config.resume == "never" or not collectives.everywhere(all(file.is_file() for file in files)):
        return None
    summary = cast(Summary, collectives.together(lambda: read_json(files[0])))
    # Without a checkpoint the summary itself says which run was finished, by the settings beside it.
    if start.checkpoint is None:
        if "identity" not in summary:
            return None
        saved = {"identity": summary["identity"], "config": yaml.safe_load(files[1].read_text())}
        collectives.together(lambda: compare(saved, config, identity))
    elif start.state.done < config.train.steps:
        return None
    if collectives.rank() == 0:
        say(f"{files[0]} says that this run is finished; resume=never starts it over")
    return summary


def prepare_folder(config: RunConfig, start: Start) -> None:
    """Make the run's folder, write its config, and delete what an earlier run of this name has left there, unless this
    one goes on with it or reads it: a student to train further, for instance, or its adapter. For rank 0."""
    run_dir, models = config.run_dir, (config.teacher, config.student)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / SUMMARY).unlink(missing_ok=True)

    # A new run deletes what an older one left, but for what it reads itself.
    if start.checkpoint is None:
        (run_dir / "metrics.jsonl").unlink(missing_ok=True)
        shutil.rmtree(run_dir / "skipped", ignore_errors=True)
        read = [Path(p).expanduser().resolve() for m in models for p in (m.path, m.tokenizer, m.lora.adapter) if p]
        for folder in (run_dir / BEST, run_dir / STUDENT):
            if not any(path.is_relative_to(folder.resolve()) for path in read):
                shutil.rmtree(folder, ignore_errors=True)
    config.save(run_dir / CONFIG)
