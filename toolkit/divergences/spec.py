"""Which divergence, by exact name, and its parameters."""

import difflib
from dataclasses import dataclass

#: name -> (what it is, where it comes from). p is the teacher, q the student.
KNOWN = {
    "fkl": "KL(p, q), forward KL",
    "rkl": "KL(q, p), reverse KL (MiniLLM, arXiv 2306.08543)",
    "symmetric_kl": "0.5 KL(p, q) + 0.5 KL(q, p)",
    "jsd": "b KL(p, m) + (1 - b) KL(q, m), m = b p + (1 - b) q (GKD, arXiv 2306.13649)",
    "tvd": "0.5 sum |p - q| (f-distill, arXiv 2307.15190)",
    "skl": "KL(p, a p + (1 - a) q), skewed forward KL (DistiLLM, arXiv 2402.03898)",
    "srkl": "KL(q, (1 - a) p + a q), skewed reverse KL (DistiLLM, arXiv 2402.03898)",
}
SKEWED = ("skl", "srkl")


@dataclass(frozen=True)
class Divergence:
    """A divergence by name; `alpha` is read by skl and srkl, `beta` by jsd.

    alpha = 0 makes skl the forward and srkl the reverse KL. `beta` weighs the teacher in the mixture of jsd.
    Raises ValueError for a name that is not in `KNOWN`, alpha outside [0, 1) or, for jsd, beta outside (0,
    1).
    """

    name: str
    alpha: float = 0.1
    beta: float = 0.5

    def __post_init__(self):
        if self.name not in KNOWN:
            nearest = difflib.get_close_matches(str(self.name), KNOWN, n=1, cutoff=0.0)
            raise ValueError(
                f"unknown divergence {self.name!r}; known: {', '.join(KNOWN)}; did you mean {nearest[0]!r}?"
            )
        if not 0.0 <= self.alpha < 1.0:
            raise ValueError(
                f"alpha is {self.alpha}, but must lie in [0, 1): at 1 the mixture is its own target "
                "and nothing is learned. Use alpha=0.1 (the paper's choice), or alpha=0 for the plain KL"
            )
        if self.name == "jsd" and not 0.0 < self.beta < 1.0:
            raise ValueError(
                f"beta is {self.beta}, but jsd needs it in (0, 1): at 0 and 1 it is zero everywhere. "
                "Use beta=0.5, or name 'fkl' or 'rkl' for the limits"
            )
