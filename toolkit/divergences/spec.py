"""What is minimised: a divergence, by exact name and with its parameters, and a cross entropy beside it."""

import difflib
import math
from dataclasses import KW_ONLY, dataclass

#: name -> (what it is, where it comes from). p is the teacher, q the student.
KNOWN = {
    "fkl": "KL(p, q), forward KL",
    "rkl": "KL(q, p), reverse KL (MiniLLM, arXiv 2306.08543)",
    "symmetric_kl": "0.5 KL(p, q) + 0.5 KL(q, p)",
    "jsd": "b KL(p, m) + (1 - b) KL(q, m), m = b p + (1 - b) q (GKD, arXiv 2306.13649)",
    "tvd": "0.5 sum |p - q| (f-distill, arXiv 2307.15190)",
    "skl": "KL(p, a p + (1 - a) q), skewed forward KL (DistiLLM, arXiv 2402.03898)",
    "srkl": "KL(q, (1 - a) p + a q), skewed reverse KL (DistiLLM, arXiv 2402.03898)",
    "abkd": "alpha-beta-divergence, alpha and beta above 0 (ABKD, arXiv 2505.04560)",
    "akl": "w KL(p, q) + (1 - w) KL(q, p), w = share of |p - q| in the teacher's head (AKL, arXiv 2404.02657)",
    "taid": "KL(m, q), m = softmax((1 - a) student logits + a teacher logits), a constant (TAID, arXiv 2501.16937)",
}
#: Divergences whose alpha may be given per token.
WITH_ALPHA = ("skl", "srkl", "taid")
#: Divergences whose alpha may be chosen for each sequence, from what both models say of it.
WITH_SEQUENCE_ALPHA = ("skl", "srkl")


@dataclass(frozen=True)
class Divergence:
    """A divergence by name, with its parameters.

    alpha: the skew of skl and srkl, in [0, 1): 0 makes them the forward and reverse KL. For taid the teacher's share of
    the target, in (0, 1]: 1 makes it the forward KL. For abkd its alpha, above 0.
    beta: the teacher's weight in the mixture of jsd, in (0, 1). For abkd its beta, above 0.
    head_mass: for akl, the probability mass that the teacher's head holds at most, in (0, 1).
    Raises ValueError for a name that is not in `KNOWN` and for a parameter that its divergence cannot use.
    """

    name: str
    alpha: float = 0.1
    beta: float = 0.5
    head_mass: float = 0.5

    def __post_init__(self) -> None:
        if self.name not in KNOWN:
            near = difflib.get_close_matches(str(self.name), KNOWN, n=1, cutoff=0.0)
            raise ValueError(f"unknown divergence {self.name!r}; known: {', '.join(KNOWN)}; did you mean {near[0]!r}?")
        if self.name == "abkd":
            if not (self.alpha > 0.0 and self.beta > 0.0):
                raise ValueError(
                    f"abkd has alpha {self.alpha} and beta {self.beta}, but both must be above 0: the paper's choice "
                    "for instructions is alpha=0.2, beta=0.7; for the limits use 'fkl' (1, 0) or 'rkl' (0, 1)"
                )
        elif self.name == "taid":
            if not 0.0 < self.alpha <= 1.0:
                raise ValueError(
                    f"alpha is {self.alpha}, but taid needs it in (0, 1]: it is the teacher's share of the target, and "
                    "at 0 nothing is learned; let it rise from about 0.4 to 1"
                )
        elif not 0.0 <= self.alpha < 1.0:
            raise ValueError(
                f"alpha is {self.alpha}, but must lie in [0, 1): at 1 the mixture is its own target and nothing is "
                "learned; use alpha=0.1 (the paper's choice), or alpha=0 for the plain KL"
            )
        if self.name == "jsd" and not 0.0 < self.beta < 1.0:
            raise ValueError(
                f"beta is {self.beta}, but jsd needs it in (0, 1), at whose ends it is zero everywhere: use beta=0.5, "
                "or 'fkl' or 'rkl' for the limits"
            )
        if self.name == "akl" and not 0.0 < self.head_mass < 1.0:
            raise ValueError(f"head_mass is {self.head_mass}, but akl needs it in (0, 1); the paper's is 0.5")


def check_temperature(temperature: float) -> None:
    """Raises ValueError unless it is positive and finite."""
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, but must be positive and finite: 1.0 leaves logits unchanged")


@dataclass(frozen=True)
class Objective:
    """What is minimised at a token: divergence + cross_entropy_weight * cross entropy with its target, in nats.

    divergence: None for the cross entropy alone, which needs no teacher.
    temperature: divides both models' logits in the divergence. The cross entropy is that of the model, at 1.
    alpha_per_sequence: skl and srkl take an alpha for each sequence, at most the divergence's own, from both models'
    probabilities of its targets (`formulas.sequence_alpha`).
    Raises ValueError for a temperature that is not positive, and for alpha_per_sequence with a divergence that has no
    such alpha.
    """

    divergence: Divergence | None
    _: KW_ONLY
    cross_entropy_weight: float = 0.0
    temperature: float = 1.0
    alpha_per_sequence: bool = False

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        name = None if self.divergence is None else self.divergence.name
        if self.alpha_per_sequence and name not in WITH_SEQUENCE_ALPHA:
            raise ValueError(
                f"alpha_per_sequence is for {' and '.join(WITH_SEQUENCE_ALPHA)}, but the divergence is {name!r}: "
                "set it to False, or change the divergence"
            )


#: What is minimised where no teacher is asked.
CROSS_ENTROPY = Objective(None, cross_entropy_weight=1.0)
