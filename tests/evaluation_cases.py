"""What the pools' ranks run for the evaluation tests. Nothing here is a test."""

import contextlib
import io

import torch


def command(arguments):
    """(exit code, what was printed, what was said on stderr, result) of `python -m toolkit ARGUMENTS` on this rank."""
    from toolkit import distributed
    from toolkit.cli import main

    keep, distributed.stop = distributed.stop, lambda: None  # the pool goes on using its group
    out, err, code, result = io.StringIO(), io.StringIO(), 0, None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            result = main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    finally:
        distributed.stop = keep
        torch.distributed.barrier()
    return code, out.getvalue(), err.getvalue(), result


def rouge_l(texts, references):
    from toolkit.evaluation import score

    return score("rouge_l", texts, references)
