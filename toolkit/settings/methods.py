"""Methods of distillation by name: each is some settings of the one loop, and nothing else."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from toolkit.settings.overrides import unknown
from toolkit.settings.run import RunConfig

#: What a method has where it says nothing else, so that none is left with a part of the one that was set before it.
COMMON = {
    "loss.cross_entropy_weight": 0.0, "loss.student_text_cross_entropy_weight": 0.0, "loss.student_text_divergence": "",
    "loss.alpha": 0.1, "loss.alpha_end": None, "loss.alpha_per_sequence": False,
    "loss.beta": 0.5, "loss.head_mass": 0.5, "schedule.mixed_share": 0.5, "data.responses": "data",
    "rollout.train_on_fresh": False,
}  # fmt: skip


class Method(NamedTuple):
    """What a method is, where it is from, and what it has of its own."""

    what: str
    own: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting that makes the method, in the order in which they are applied."""
        return COMMON | self.own


NO_TEACHER = {"loss.divergence": "none", "loss.cross_entropy_weight": 1.0, "schedule.policy": "off"}

#: Each follows the paper that introduced the method, as far as one loop over one kind of step can; where it does not,
#: its text says so. DistiLLM's released code differs from its paper, see docs/reproduction.md.
METHODS = {
    "sft": Method(
        "supervised fine-tuning on the data's responses, without a teacher",
        {**NO_TEACHER, "teacher.path": "", "teacher.random_weights": False},
    ),
    "kd": Method("forward KL on the data (Hinton et al., arXiv 1503.02531)",
                 {"loss.divergence": "fkl", "schedule.policy": "off"}),
    "seqkd": Method(
        "forward KL on the teacher's text, generated once (after arXiv 1606.07947, where it is cross entropy)",
        {"loss.divergence": "fkl", "schedule.policy": "off", "data.responses": "teacher"},
    ),
    "imitkd": Method("forward KL on the student's text alone (Lin et al., arXiv 2009.07253, mix it with the data's)",
                     {"loss.divergence": "fkl", "schedule.policy": "on_policy", "rollout.train_on_fresh": True}),
    "gkd": Method(
        "Jensen-Shannon divergence, half of the steps on the student's text (arXiv 2306.13649)",
        {"loss.divergence": "jsd", "loss.beta": 0.5, "schedule.policy": "mixed", "schedule.mixed_share": 0.5,
         "rollout.train_on_fresh": True},
    ),
    "minillm": Method(
        "reverse KL on the student's text: MiniLLM's objective (arXiv 2306.08543), token by token and without its "
        "policy-gradient estimator and teacher-mixed sampling",
        {"loss.divergence": "rkl", "schedule.policy": "on_policy", "rollout.train_on_fresh": True},
    ),
    "distillm_skl": Method("skewed forward KL, adaptive off-policy schedule (arXiv 2402.03898)",
                           {"loss.divergence": "skl", "loss.alpha": 0.1, "schedule.policy": "adaptive"}),
    "distillm_srkl": Method("skewed reverse KL, adaptive off-policy schedule (arXiv 2402.03898)",
                            {"loss.divergence": "srkl", "loss.alpha": 0.1, "schedule.policy": "adaptive"}),
    "distillm2": Method(
        "skewed forward KL on the teacher's text, skewed reverse KL on the student's, with an alpha for each text; "
        "half of the steps each, where arXiv 2503.07067 has pairs",
        {"loss.divergence": "skl", "loss.student_text_divergence": "srkl", "loss.alpha": 0.1,
         "loss.alpha_per_sequence": True, "data.packing": False, "data.responses": "teacher",
         "schedule.policy": "mixed", "schedule.mixed_share": 0.5, "rollout.train_on_fresh": True},
    ),
    "abkd": Method("alpha-beta-divergence on the data (arXiv 2505.04560)",
                   {"loss.divergence": "abkd", "loss.alpha": 0.2, "loss.beta": 0.7, "schedule.policy": "off"}),
    "akl": Method("adaptive KL on the data (arXiv 2404.02657)",
                  {"loss.divergence": "akl", "loss.head_mass": 0.5, "schedule.policy": "off"}),
    "taid": Method(
        "an interpolated teacher that moves to the real one (arXiv 2501.16937, in a straight line)",
        {"loss.divergence": "taid", "loss.alpha": 0.4, "loss.alpha_end": 1.0, "schedule.policy": "off"},
    ),
}  # fmt: skip


def with_method(config: RunConfig, method: str, settings: Mapping[str, Any] | None = None) -> RunConfig:
    """`config` with the settings of a method, then `settings` ({"section.key": value}).

    Raises ValueError for a method that is not in METHODS and for an unknown setting.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    return config.with_settings({**METHODS[method].settings, **(settings or {})})


def expanded(arguments: list[str]) -> list[str]:
    """`method=NAME`, or `STAGE.method=NAME`, replaced by that method's settings in its place; the others as they are.

    Raises ValueError for a method that is not in METHODS.
    """
    found = []
    for text in arguments:
        key, _, name = text.partition("=")
        stage, dot, last = key.rpartition(".")
        if last != "method":
            found.append(text)
        elif name not in METHODS:
            raise unknown(key, name, METHODS)
        else:
            found += [f"{stage}{dot}{setting}={json.dumps(value)}" for setting, value in METHODS[name].settings.items()]
    return found
