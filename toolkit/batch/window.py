"""An optimizer step's examples, laid into micro-batches of about equal size with little padding."""

import heapq
import math
from collections.abc import Callable, Sequence

from toolkit.batch.layout import DECODER_ONLY, RowLayout
from toolkit.batch.token_batch import Example, Rows, TokenBatch, round_up

InRows = Callable[[Sequence[Example]], Rows]


def make_window(
    examples: Sequence[Example],
    micro_size: int,
    pad_id: int,
    pad_to_multiple: int = 8,
    pack_to: int | None = None,
    layout: RowLayout = DECODER_ONLY,
    micro_tokens: int | None = None,
    agree: Callable[[int], int] = lambda count: count,
) -> list[TokenBatch]:
    """One rank's share of an optimizer step as len(examples) / micro_size micro-batches.

    The step's loss is a sum over all of them, so which example lies in which is free. They are sorted by length,
    longest first: little padding, and what does not fit into memory is seen at once. With `pack_to`, micro-batches get
    about as many tokens each, in the rows that need the least padding, none longer than `pack_to` but for an example
    that is.

    micro_tokens: in place of micro_size, as few micro-batches as hold at most so many tokens each, padding included,
    but for one example that has more by itself. All ranks have to take as many: `agree` is told this rank's number
    and returns that of the rank which needs most, and this rank splits its micro-batches up to it.

    Raises ValueError for no examples, if micro_size < 1, or if it does not divide len(examples); and with `pack_to` for
    a layout that does not take several texts in a row.
    """
    if not examples or (micro_tokens is None and (micro_size < 1 or len(examples) % micro_size)):
        told = f"a window of {len(examples)} examples in micro-batches of {micro_size}"
        raise ValueError(f"{told}; the window must hold at least one micro-batch and be a multiple of its size")
    layout.check_use(packing=pack_to is not None)

    def in_rows(part: Sequence[Example]) -> Rows:
        return [[one] for one in part] if pack_to is None else _least_padding(part, pack_to, pad_to_multiple)

    def area(rows: Rows) -> int:
        return layout.area(rows, pad_to_multiple)

    # Micro-batches by a bound on tokens, of about as many tokens, or of as many examples.
    ordered = sorted(examples, key=_length, reverse=True)
    if micro_tokens is not None:
        fill = _fill_sorted if pack_to is None else _fill_evenly
        parts = fill(ordered, in_rows, lambda rows: area(rows) <= micro_tokens)
        parts = _split_up(parts, agree(len(parts)), area)
    elif pack_to is not None:
        parts = [in_rows(part) for part in _even_parts(ordered, len(ordered) // micro_size)]
    else:
        parts = [in_rows(ordered[start : start + micro_size]) for start in range(0, len(ordered), micro_size)]
    return [layout.batch_of_rows(rows, pad_id, pad_to_multiple) for rows in parts]


def _fill_sorted(ordered: list[Example], in_rows: InRows, fits: Callable[[Rows], bool]) -> list[Rows]:
    """Micro-batches one after the other, each as full as it may be."""
    parts: list[Rows] = []
    for rows in map(in_rows, ([one] for one in ordered)):
        if parts and fits(parts[-1] + rows):
            parts[-1] += rows
        else:
            parts.append(rows)
    return parts


def _fill_evenly(ordered: list[Example], in_rows: InRows, fits: Callable[[Rows], bool]) -> list[Rows]:
    """The smallest number of micro-batches of about as many tokens; an example that does not fit gets a micro-batch
    of its own."""
    alone = [in_rows([one]) for one in ordered]
    large = [rows for rows in alone if not fits(rows)]
    rest = [one for one, rows in zip(ordered, alone, strict=True) if fits(rows)]
    for count in range(1, len(rest)):
        parts = [in_rows(part) for part in _even_parts(rest, count)]
        if all(map(fits, parts)):
            return large + parts
    return large + [in_rows([one]) for one in rest]


def _split_up(parts: list[Rows], count: int, area: Callable[[Rows], int]) -> list[Rows]:
    """`parts` with the largest halved until there are `count`: by rows, a single row by its examples. No half is
    larger than the whole, so what held still holds."""
    parts = list(parts)
    while len(parts) < count:
        index = max((i for i, rows in enumerate(parts) if sum(map(len, rows)) > 1), key=lambda i: area(parts[i]))
        rows, row = parts[index], parts[index][0]
        by_rows = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
        by_examples = [[row[: len(row) // 2]], [row[len(row) // 2 :]]]
        parts[index : index + 1] = by_rows if len(rows) > 1 else by_examples
    return parts


def _even_parts(examples: Sequence[Example], count: int) -> list[list[Example]]:
    """`count` parts, none empty where there are as many examples, of about as many tokens: each example, longest first,
    goes to the part that has least (Graham's longest-processing-time rule, 1969)."""
    parts: list[list[Example]] = [[] for _ in range(count)]
    heap = [(0, index) for index in range(count)]  # (tokens, part)
    for example in sorted(examples, key=_length, reverse=True):
        tokens, index = heap[0]
        parts[index].append(example)
        heapq.heapreplace(heap, (tokens + _length(example), index))
    return parts


def _least_padding(examples: Sequence[Example], pack_to: int, pad_to_multiple: int) -> Rows:
    """The examples in the number of rows that makes rows x padded length smallest; more and shorter rows on a tie."""
    found: Rows = []
    least = math.inf
    limit = max(pack_to, max(map(_length, examples)))
    for count in range(len(examples), 0, -1):
        rows = _even_parts(examples, count)
        longest = max(sum(map(_length, row)) for row in rows)
        if longest > limit:
            break
        area = count * round_up(longest, pad_to_multiple)
        if area < least:
            found, least = rows, area
    return found


def _length(example: Example) -> int:
    return len(example.tokens)
