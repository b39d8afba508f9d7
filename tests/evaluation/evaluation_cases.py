"""What the pools' ranks run for the evaluation tests. Nothing here is a test."""

import contextlib
import io

import torch


def command(arguments):
    """(exit code, what was printed, what was said on stderr, result) of `python -m toolkit ARGUMENTS` on this rank."""
    from toolkit.cli import main
    from toolkit.ranks import launch

    keep, launch.stop = launch.stop, lambda: None  # the pool goes on using its group
    out, err, code, result = io.StringIO(), io.StringIO(), 0, None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            result = main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    finally:
        launch.stop = keep
        torch.distributed.barrier()
    return code, out.getvalue(), err.getvalue(), result


def rouge_l(texts, references):
    from toolkit.evaluation import score

    return score("rouge_l", texts, references)


def impatient_command(arguments):
    """`evaluate`, which waits for another job in the same place for a tenth of a second only."""
    from toolkit.evaluation import evaluate

    kept = evaluate.sole_use
    evaluate.sole_use = lambda *args, **kwargs: kept(*args, wait_s=0.1, **kwargs)
    try:
        return command(arguments)
    finally:
        evaluate.sole_use = kept
