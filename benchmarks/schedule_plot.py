"""What each schedule does to the sources of 1,000 steps: the table of docs/schedule.md and, by matplotlib, its picture.

    python benchmarks/schedule_plot.py                        # the table
    python benchmarks/schedule_plot.py --plot docs/schedule.png

Decisions, the fallback while the buffer is too small, and the draws from it are the training loop's own code with the
real Schedule and ReplayBuffer; the texts are dummies of two tokens, and nothing is trained. The validation losses are
made up: they fall for 300 steps, then rise twice by 0.12 nats and fall once by 0.05, over and over.
"""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from toolkit.batch import Example
from toolkit.rollout.replay import ReplayBuffer
from toolkit.rollout.schedule import Schedule, Source
from toolkit.run.loop import DistillationLoop
from toolkit.settings import RolloutConfig, RunConfig, ScheduleConfig, TrainConfig
from toolkit.tables import format_table

STEPS, ROWS, VALIDATE_EVERY, WINDOW = 1000, 8, 50, 50
RELEASED = dict(reference_loss="released")
CASES = {
    "adaptive, phi 0": dict(),
    "adaptive, phi 0.2": dict(phi_initial=0.2),
    "adaptive, phi 0.5": dict(phi_initial=0.5),
    "released reference, phi 0.2": dict(phi_initial=0.2, **RELEASED),
    "released reference, phi 0.5": dict(phi_initial=0.5, **RELEASED),
    "constant share, phi 0.5": dict(phi_initial=0.5, generation_share="constant"),
    "increasing share, phi 0.5": dict(phi_initial=0.5, generation_share="increasing"),
    "mixed 0.5": dict(policy="mixed"),
    "on_policy": dict(policy="on_policy"),
    "off": dict(policy="off"),
}
FRESH = ("mixed", "on_policy")  # train on the text just made, as GKD does


def made_up_losses() -> list[float]:
    losses = [2.0]
    for at in range(STEPS // VALIDATE_EVERY):
        losses.append(losses[-1] + (-0.1 if at < 6 else (0.12, 0.12, -0.05)[at % 3]))
    return losses


def simulate(settings: dict, seed: int = 10) -> SimpleNamespace:
    """sources and phi of every step, texts that were made, ages of the rows drawn, and how often each text was used."""
    config = RunConfig(
        seed=seed, train=TrainConfig(steps=STEPS, rows_per_step=ROWS, rows_per_micro_batch=ROWS),
        rollout=RolloutConfig(train_on_fresh=settings.get("policy") in FRESH),
    )  # fmt: skip
    schedule = Schedule(ScheduleConfig(**settings), seed, STEPS)
    made: list[int] = []
    parts = SimpleNamespace(
        config=config, schedule=schedule, rollout=SimpleNamespace(weights_step=0),
        replay=ReplayBuffer(config.rollout.capacity, 0, 1, seed),
    )  # fmt: skip
    loop = SimpleNamespace(parts=parts, state=SimpleNamespace(windows_ahead=0), dataset=None, _read=lambda *_: [])

    def generate(step: int, rows: int) -> list[Example]:
        parts.rollout.weights_step = step
        texts = [Example(np.array([1, len(made) + row]), 1) for row in range(rows)]
        made.extend([step] * rows)
        return texts

    loop.generate = generate
    losses = made_up_losses()
    schedule.observe_validation(0, losses[0])
    found = SimpleNamespace(sources=[], phi=[], ages=[], uses=[], made=made)
    for step in range(STEPS):
        found.phi.append(schedule.state.phi)
        source, examples = DistillationLoop.choose_examples(loop, step)
        found.sources.append(source)
        found.ages += [step - made[example.tokens[1]] for example in examples]
        found.uses += [int(example.tokens[1]) for example in examples]
        if (step + 1) % VALIDATE_EVERY == 0:
            schedule.observe_validation(step + 1, losses[(step + 1) // VALIDATE_EVERY])
    found.phi_end = schedule.state.phi
    return found


def table(found: dict[str, SimpleNamespace]) -> str:
    rows = []
    for name, one in found.items():
        counts = [one.sources.count(source) for source in (Source.DATASET, Source.REPLAY, Source.GENERATE)]
        student = bool(one.ages)
        phi = f"{one.phi[0]:g} to {one.phi_end:.1f}" if one.phi_end else "-"
        rows.append([
            f"`{name}`", phi, *counts, len(one.made),
            len(one.uses) / len(one.made) if student else None, float(np.mean(one.ages)) if student else None,
        ])  # fmt: skip
    heads = ["schedule", "phi", "data", "replay", "generated", "texts made", "uses of a text", "age of a row (steps)"]
    return format_table(heads, rows)


def plot(found: dict[str, SimpleNamespace], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 5, figsize=(13, 5), sharex=True, sharey=True)
    middles = np.arange(WINDOW // 2, STEPS, WINDOW)
    for axis, (name, one) in zip(axes.flat, found.items(), strict=True):
        shares = [
            np.array([source is wanted for source in one.sources]).reshape(-1, WINDOW).mean(1)
            for wanted in (Source.GENERATE, Source.REPLAY, Source.DATASET)
        ]
        axis.stackplot(middles, *shares, colors=("#c44e52", "#dd9a6f", "#c9d3df"))
        if one.phi_end or one.phi[0]:
            axis.step(range(STEPS), one.phi, color="black", linewidth=1.2, where="post")
        axis.set(title=name, xlim=(middles[0], middles[-1]), ylim=(0, 1))
        axis.title.set_fontsize(10)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    for axis in axes[:, 0]:
        axis.set_ylabel("share of steps")
    names = ["generated", "replayed", "data set", "phi"]
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in ("#c44e52", "#dd9a6f", "#c9d3df")]
    handles.append(plt.Line2D([], [], color="black"))
    figure.legend(handles, names, loc="lower center", ncol=4, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, help="also draw the picture into this file; needs matplotlib")
    options = parser.parse_args()
    found = {name: simulate(settings) for name, settings in CASES.items()}
    print(table(found))
    if options.plot:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
