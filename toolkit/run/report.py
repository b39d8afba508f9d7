"""What a run prints at its end: before and after, answers beside each other, where the time went."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from toolkit.data import Data
from toolkit.run.held_out import Answers
from toolkit.run.summary import Summary
from toolkit.tables import format_table


class Sample(NamedTuple):
    """One question and what each model said to it, greedily."""

    prompt: str
    reference: str
    teacher: str | None
    student_before: str
    student_after: str


def samples(data: Data, answers: Mapping[str, Answers]) -> list[Sample]:
    """The greedy answers of the models beside each other. answers: by "initial", "final", and "teacher" where one was
    asked."""
    before, after = answers["initial"].greedy, answers["final"].greedy
    theirs: Sequence[str | None] = answers["teacher"].greedy if "teacher" in answers else [None] * len(after)
    rows = data.validation_rows[: len(after)]
    return [
        Sample(row["prompt"], row["response"], *said)
        for row, said in zip(rows, zip(theirs, before, after, strict=True), strict=True)
    ]


def final_report(summary: Summary, samples: list[Sample]) -> str:
    """The text for a finished run, from its summary.json."""
    # The first table compares the student before and after training.
    before, after, best = summary["validation"]["initial"], summary["validation"]["final"], summary["best"]
    rows = [["cross-entropy (nats/token)", f"{before['ce_nats']:.3f}", f"{after['ce_nats']:.3f}"]]
    rows.append(["perplexity", f"{before['perplexity']:.2f}", f"{after['perplexity']:.2f}"])
    if after["kl_nats"] is not None:  # there is a teacher
        rows.insert(0, ["KL to the teacher (nats/token)", f"{before['kl_nats']:.3f}", f"{after['kl_nats']:.3f}"])
        agreements = f"{before['top1_agreement']:.1%}", f"{after['top1_agreement']:.1%}"
        rows.append(["top-1 agreement with the teacher", *agreements])
    if summary["rouge_l"]:
        rouge = summary["rouge_l"]
        rows.append([f"ROUGE-L of {rouge['rows']} sampled answers", f"{rouge['initial']:.1f}", f"{rouge['final']:.1f}"])
        if "teacher" in rouge:
            rows.append(["ROUGE-L of the teacher's", f"{rouge['teacher']:.1f}", f"{rouge['teacher']:.1f}"])
    parts = [format_table(["validation", "before", "after"], rows)]

    # Some answers follow, each below its question.
    for sample in samples:
        parts.append("\n".join([
            f"> {sample.prompt}",
            _block("reference", sample.reference),
            *([] if sample.teacher is None else [_block("teacher", sample.teacher)]),
            _block("student before", sample.student_before),
            _block("student after", sample.student_after),
        ]))  # fmt: skip

    # The end says where the time went, and sums the run up.
    share = summary["time_share"]
    seconds = [[name, f"{part * summary['wall_time_s']:.1f}", f"{part:.1%}"] for name, part in share.items()]
    parts.append(format_table(["phase", "seconds", "share"], [row for row in seconds if row[1] != "0.0"]))
    sources = ", ".join(f"{count} {name}" for name, count in summary["source_counts"].items())
    parts.append(
        f"{summary['steps']} steps ({sources}; phi {summary['phi_final']:.2f}), {summary['tokens']:,} tokens, "
        f"{summary['tokens_per_s']:,.0f} tokens/s, {summary['precision']}, peak memory "
        f"{summary['peak_rss_gib']:.1f} GiB over {summary['ranks']} ranks\nstudent: {summary['student']}"
        + (f"\nbest by {best['by']}: {best['value']:.4g} after step {best['step']}, {best['student']}" if best else "")
    )
    return "\n\n".join(parts)


def _block(label: str, text: str) -> str:
    return textwrap.fill(text or "(nothing)", 110, initial_indent=f"  {label + ':':<16}", subsequent_indent=" " * 18)
