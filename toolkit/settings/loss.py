"""The `loss` section: what is minimised at each response token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolkit.settings.section import Section
from toolkit.settings.setting import setting

if TYPE_CHECKING:
    from toolkit.settings.run import RunConfig

NO_DIVERGENCE = "none"


def divergence_names() -> Sequence[str]:
    """The divergences that toolkit.divergences knows; a function, since importing them imports torch."""
    from toolkit.divergences.spec import KNOWN

    return (*KNOWN, NO_DIVERGENCE)


@dataclass(frozen=True)
class LossConfig(Section):
    """What is minimised at each response token, in nats: a divergence from the teacher, and cross entropy beside it."""

    # fmt: off
    divergence: str = setting("skl",
        "Divergence between teacher and student. none asks no teacher: cross entropy alone, as in supervised "
        "fine-tuning; a teacher is then used by validation only, and may be left out.", choices=divergence_names)
    student_text_divergence: str = setting("",
        "Divergence on text that the student generated.", choices=divergence_names,
        means={"": "the same as loss.divergence"})
    alpha: float = setting(0.1,
        "Parameter of skl and srkl (the skew, in [0, 1)), of taid (the teacher's share, in (0, 1]) and of abkd (above "
        "0).")
    alpha_end: float | None = setting(None,
        "Value that alpha moves to over the run, in a straight line; TAID moves from 0.4 to 1.",
        means={None: "alpha stays as it is"})
    alpha_per_sequence: bool = setting(False,
        "Each text gets an alpha of its own, at most loss.alpha, for skl and srkl (DistiLLM-2): the smaller, the less "
        "the models differ on it in comparison with the other texts of its micro-batch. The loss then depends on the "
        "number of ranks and on the size of a micro-batch. Not with data.packing; costs one more product with each "
        "head.")
    beta: float = setting(0.5,
        "Parameter of jsd (the teacher's weight in the mixture, in (0, 1)) and of abkd (above 0).")
    head_mass: float = setting(0.5, "Probability mass of the teacher's head in akl, in (0, 1).")
    temperature: float = setting(1.0, "Both models' logits are divided by it.", above=0)
    cross_entropy_weight: float = setting(0.0,
        "Weight of the cross entropy with the data's next token, added to the divergence; steps on the student's own "
        "text leave it out.", least=0)
    student_text_cross_entropy_weight: float = setting(0.0,
        "The same on the student's own text, as if it were data. This makes likelier whatever the student says, right "
        "or wrong, and may collapse it to a few phrases as phi rises.", least=0)
    memory_budget_mib: int | None = setting(None,
        "Bound on the memory of the logit tiles.", unit="MiB", least=1, means={None: "256 on a CPU, 3072 on a GPU"},
        may_change=True)
    # fmt: on

    def validate(self, section: str = "loss") -> None:
        """Raises ValueError for the first setting that cannot work."""
        super().validate(section)
        from toolkit.divergences.spec import WITH_SEQUENCE_ALPHA, Divergence

        names = {self.divergence, self.student_text_divergence or self.divergence} - {NO_DIVERGENCE}
        for name in sorted(names):
            for alpha in (self.alpha, self.alpha if self.alpha_end is None else self.alpha_end):
                Divergence(name, alpha=alpha, beta=self.beta, head_mass=self.head_mass)
        if self.alpha_per_sequence and not (names and names <= set(WITH_SEQUENCE_ALPHA) and self.alpha > 0.01):
            raise ValueError(
                f"{section}.alpha_per_sequence is for {' and '.join(WITH_SEQUENCE_ALPHA)} with an alpha above 0.01, "
                f"not {sorted(names)} with {section}.alpha = {self.alpha}; set it to false, or change these"
            )
        if self.divergence == NO_DIVERGENCE and (self.cross_entropy_weight != 1 or self.student_text_divergence):
            raise ValueError(
                f"{section}.divergence = {NO_DIVERGENCE!r} with {section}.cross_entropy_weight = "
                f"{self.cross_entropy_weight} and {section}.student_text_divergence = "
                f'{self.student_text_divergence!r}; set them to 1 and ""'
            )

    def check_with(self, run: RunConfig) -> None:
        """Without a divergence there is no student text, and an alpha of each text needs a row for each. Raises
        ValueError."""
        if self.divergence == NO_DIVERGENCE and run.schedule.policy != "off":
            raise ValueError(
                f'loss.divergence = "{NO_DIVERGENCE}" with schedule.policy = "{run.schedule.policy}": the student\'s '
                'own text teaches nothing then; set schedule.policy to "off", or loss.divergence to "skl"'
            )
        if self.alpha_per_sequence and (run.data.packing or run.data.kind == "text"):
            raise ValueError(
                f"loss.alpha_per_sequence = true with data.packing = {run.data.packing} and data.kind = "
                f"{run.data.kind!r}: a row of several texts would have one alpha; set it to false, or use "
                'data.packing=false and data.kind="instructions"'
            )
