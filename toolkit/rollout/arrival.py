"""Whether a server speaks by the weights that it was handed: its log-probabilities of fixed tokens tell.

They are held against the student's own. In bf16 the two differ by rounding, which is more than one step at a usual
learning rate changes them: this comparison alone would take old weights for new ones. Hence two more:

- The server starts with weights that are far from the student's (`write_start`). After the first push, whatever it has
  kept of them shows as a difference that nobody takes for rounding.
- A server that reads new weights gives other answers, in nearly every last digit. One whose answers stay the same digit
  by digit, while the student's own change, has read nothing.
"""

import filecmp
import shutil
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor

PROBE_TOKENS = 128
#: share of the mean log-probability that passes for rounding: bf16 makes up to 0.015, and one tensor of a model of 30
#: layers that is still `write_start`'s at least 0.19
TOLERANCE = 0.03
START_SCALE = -16.0
#: share of the rounding: a student that moved by less, at half of the tokens, may leave a server's answers as they were
MOVED = 0.001


def probe_tokens(vocabulary_size: int, longest: int) -> np.ndarray:
    """The ids that server and student are asked about, int [T], always the same. longest: tokens that the server holds,
    of which one is its own."""
    return np.random.default_rng(0).integers(0, vocabulary_size, min(PROBE_TOKENS, longest - 1))


def write_start(source: Path, target: Path) -> None:
    """A copy of the exported model in `source` that speaks nonsense: the rows of every tensor are in reverse order, and
    START_SCALE times as large, so that a single one of them in place of the student's shows. `target` appears by
    rename."""
    unfinished = target.with_name(target.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(source, unfinished, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in source.glob("*.safetensors"):
        nonsense = {name: _nonsense(weight) for name, weight in load_file(file).items()}
        save_file(nonsense, unfinished / file.name, metadata={"format": "pt"})
        shutil.copymode(file, unfinished / file.name)
    shutil.rmtree(target, ignore_errors=True)
    unfinished.rename(target)


def _nonsense(weight: Tensor) -> Tensor:
    if not weight.is_floating_point():
        return weight
    return START_SCALE * (weight.flip(0) if weight.dim() else weight)


class Arrivals:
    """What server and student said after the pushes so far."""

    def __init__(self) -> None:
        self.folder: Path | None = None  # of the last push
        # Of the last push that changed the server's answer, and whether the student's weights have changed since.
        self.wanted = self.found = np.zeros(0)
        self.is_changed = False

    def objection(self, folder: Path, wanted: np.ndarray, found: np.ndarray) -> str:
        """What shows that the weights in `folder` have not arrived, or "".

        wanted: what the student says of the probe's tokens, found: what the server says of them; float [T - 1], nats.
        The folder of the push before has to be there still.
        """
        error_nats, scale_nats = float(np.abs(found - wanted).mean()), float(np.abs(wanted).mean())
        if not error_nats <= TOLERANCE * scale_nats:
            return (
                f"speaks by other weights than those in {folder}: its log-probabilities of {len(wanted)} tokens differ "
                f"from the student's by {error_nats:.3g} nats in the mean; of {scale_nats:.3g} nats, "
                f"{TOLERANCE * scale_nats:.2g} are taken for rounding"
            )
        # Unequal answers by equal weights, as some GPU kernels give them, are no change: the files themselves tell.
        self.is_changed |= self.folder is not None and not _have_same_weights(self.folder, folder)
        self.folder = folder
        if not np.array_equal(found, self.found):
            self.wanted, self.found, self.is_changed = wanted, found, False
        # How far the student's own answers have moved since the server's changed last.
        moved_nats = float(np.median(np.abs(wanted - self.wanted)))
        if self.is_changed and moved_nats > MOVED * float(np.abs(self.found - self.wanted).mean()):
            return (
                f"speaks by the weights of an earlier push, not by those in {folder}: its log-probabilities of "
                f"{len(wanted)} tokens are the same to the last digit, and half of the student's own have changed "
                f"by {moved_nats:.2g} nats or more"
            )
        return ""


def _have_same_weights(one: Path, other: Path) -> bool:
    """Whether the files of two exports are equal; they are read as far as the first difference."""
    names = sorted(file.name for file in one.glob("*.safetensors"))
    return names == sorted(file.name for file in other.glob("*.safetensors")) and all(
        filecmp.cmp(one / name, other / name, shallow=False) for name in names
    )
