"""The row passes in plain torch: any device, any dtype, and the twin that the faster kernels are compared with.

Legend: r rows of a row block, B columns of a tile. Buffers without a suffix are [r, B].
"""

import torch
from torch import Tensor

from toolkit.divergences.head import LOG_ZERO, Head
from toolkit.divergences.kernels.rows import CODES, Passes, Row, RowTask, rows_of, sum_of_gradients
from toolkit.divergences.spec import Divergence

#: Elements of a row block: its buffers stay in a CPU's last-level cache; on a GPU a launch has enough to do.
BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}
N_BUFFERS = 9


class TorchRows:
    """The `RowKernel` of this module, with buffers that are allocated once and used for block after block of rows."""

    def __init__(self, tile_rows: int, tile_columns: int, budget_bytes: int, dtype: torch.dtype, device: torch.device):
        self.block_rows = block_rows(tile_rows, tile_columns, budget_bytes, dtype, device)
        self.dtype, self.device, self.columns = dtype, device, tile_columns
        self.buffers: dict[str, Tensor] = {}

    def __call__(
        self, task: RowTask, state: Tensor, *, student_nB: Tensor, teacher_nB: Tensor | None, out_nB: Tensor | None,
        passes: Passes,
    ) -> None:  # fmt: skip
        for start in range(0, len(student_nB), self.block_rows):
            rows = slice(start, start + self.block_rows)
            teacher, out = rows_of(teacher_nB, rows), rows_of(out_nB, rows)
            self._block(task.rows(rows), state[:, rows], student_nB[rows], teacher, out, passes)

    def _block(
        self, task: RowTask, state: Tensor, student: Tensor, teacher: Tensor | None, out: Tensor | None, passes: Passes
    ) -> None:
        # STATISTICS keeps of both models' logits what later passes need.
        spec, temperature = task.objective.divergence, task.objective.temperature
        s = self._logits("student", student, task.student)
        t = None if teacher is None or task.teacher is None else self._logits("teacher", teacher, task.teacher)
        alpha = None if task.alpha_n is None else task.alpha_n.unsqueeze(-1)
        targets = None if task.targets_n is None else (task.targets_n - task.first_column).unsqueeze(-1)
        if Passes.STATISTICS in passes:
            self._statistics(task, state, s, t, alpha, targets)
        if not (Passes.GRADIENT in passes or Passes.SUMS in passes):
            return

        # Both distributions, and the divergence's terms of each column.
        log_q = self._log_probabilities("log_q", s, temperature, state, Row.STUDENT_MAX, Row.STUDENT_SUM_T)
        q = torch.exp(log_q, out=self._buffer("q", s))
        h = r = None
        if t is not None:
            assert spec is not None
            if alpha is not None and task.code == CODES["taid"]:
                mixed = _interpolate(s, t, alpha, self._buffer("x", s))
                log_p = self._log_probabilities("log_p", mixed, temperature, state, Row.MIXED_MAX, Row.MIXED_SUM_T)
            else:
                log_p = self._log_probabilities("log_p", t, temperature, state, Row.TEACHER_MAX, Row.TEACHER_SUM_T)
            if Passes.SUMS in passes and task.threshold_n is not None:
                add_head_errors(state, log_p, q, t >= task.threshold_n.unsqueeze(-1))
            f, g, h, r = terms(spec, log_p, log_q, q, alpha, self._buffer("x", s), self._buffer("y", s))
            if Passes.SUMS in passes:
                state[Row.SUM_0] += f
                state[Row.SUM_1] += g

        # The gradient is that of the divergence and of the cross entropy, weighted, with respect to the product.
        if Passes.GRADIENT in passes:
            assert out is not None
            sum_g, w = sum_of_gradients(task.code, state)
            if w is not None and h is not None and r is not None:
                # akl's h and r come without their weights, which need the complete sums.
                h.mul_((1.0 - w).unsqueeze(-1))
                r.mul_(w.unsqueeze(-1))
            g = gradient(q, h, r, sum_g.unsqueeze(-1))
            if temperature != 1.0:
                g.div_(temperature)
            if targets is not None and task.objective.cross_entropy_weight != 0.0:
                self._add_cross_entropy(task, state, s, g, q, targets)
            if task.weights_n is not None:
                g.mul_(task.weights_n.unsqueeze(-1))
            if task.student.cap is not None or task.student.scale != 1.0:
                g.mul_(task.student.slope(s))
            out.copy_(g)

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        if name not in self.buffers:
            self.buffers[name] = torch.empty(self.block_rows * self.columns, dtype=self.dtype, device=self.device)
        return self.buffers[name][: like.numel()].view(like.shape)

    def _logits(self, name: str, products: Tensor, head: Head) -> Tensor:
        """Logits in a buffer; the tile itself is left as it is."""
        return head.to_logits_(self._buffer(name, products).copy_(products))

    def _statistics(
        self, task: RowTask, state: Tensor, s: Tensor, t: Tensor | None, alpha: Tensor | None, targets: Tensor | None
    ) -> None:
        """Maxima, sums of exponentials, and the student's logits at the target and at the teacher's first choice."""
        # The student's logit at the target is kept where that lies in these columns.
        x, temperature = self._buffer("x", s), task.objective.temperature
        _merge(state, Row.STUDENT_MAX, (Row.STUDENT_SUM, Row.STUDENT_SUM_T), s, temperature, x)
        if targets is not None:
            inside = (targets >= 0) & (targets < s.shape[-1])
            found = s.gather(-1, targets.clamp(0, s.shape[-1] - 1))
            state[Row.AT_TARGET] = torch.where(inside, found, state[Row.AT_TARGET].unsqueeze(-1)).squeeze(-1)
        if t is None:
            return

        # The student's logit is kept where the teacher's is the largest so far.
        old = state[Row.TEACHER_MAX].clone()
        best, choice = t.max(-1, keepdim=True)
        chosen = s.gather(-1, choice).squeeze(-1)
        state[Row.AT_TEACHER_CHOICE] = torch.where(best.squeeze(-1) > old, chosen, state[Row.AT_TEACHER_CHOICE])
        _merge(state, Row.TEACHER_MAX, (None, Row.TEACHER_SUM_T), t, temperature, x)
        if alpha is not None and task.code == CODES["taid"]:
            mixed = _interpolate(s, t, alpha, self._buffer("y", s))
            _merge(state, Row.MIXED_MAX, (None, Row.MIXED_SUM_T), mixed, temperature, x)

    def _log_probabilities(
        self, name: str, z: Tensor, temperature: float, state: Tensor, largest: Row, total: Row
    ) -> Tensor:
        out = torch.sub(z, state[largest].unsqueeze(-1), out=self._buffer(name, z))
        if temperature != 1.0:
            out.div_(temperature)
        return out.sub_(state[total].log().unsqueeze(-1)).clamp_(min=LOG_ZERO)

    def _add_cross_entropy(
        self, task: RowTask, state: Tensor, s: Tensor, g: Tensor, q: Tensor, targets: Tensor
    ) -> None:
        """g += weight * (q1 - onehot); q is overwritten where it is not q1."""
        weight = task.objective.cross_entropy_weight
        if task.objective.temperature == 1.0:
            g.add_(q, alpha=weight)
        else:
            q1 = self._log_probabilities("q", s, 1.0, state, Row.STUDENT_MAX, Row.STUDENT_SUM).exp_()
            g.add_(q1, alpha=weight)
        inside = (targets >= 0) & (targets < g.shape[-1])
        g.scatter_add_(-1, targets.clamp(0, g.shape[-1] - 1), inside.to(g.dtype) * -weight)


def block_rows(tile_rows: int, columns: int, budget_bytes: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of a block, whose buffers take at most `budget_bytes` (one row's are always taken)."""
    cached = BLOCK_ELEMENTS.get(device.type, BLOCK_ELEMENTS["cuda"]) // columns
    fit = budget_bytes // (N_BUFFERS * columns * dtype.itemsize)
    return max(1, min(tile_rows, cached, fit))


def gradient(q: Tensor, h: Tensor | None, r: Tensor | None, sum_g: Tensor) -> Tensor:
    """q (h - sum G) + r of a row block [r, B]; sum_g [r, 1]. h or r is used up."""
    if h is None:
        return q * -sum_g if r is None else r.addcmul_(q, sum_g, value=-1.0)
    g = h.sub_(sum_g).mul_(q)
    return g if r is None else g.add_(r)


def terms(
    spec: Divergence, log_p: Tensor, log_q: Tensor, q: Tensor, alpha: Tensor | None, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(sum f [r], sum G [r], h, r) as `rows` defines them; None stands for 0. log_p, log_q, x and y are used up.
    alpha: [r, 1], of skl and srkl.

    akl: sum -p d and sum q d, and h and r without their weights.
    """
    match spec.name:
        case "fkl" | "taid":
            p = torch.exp(log_p, out=y)
            f = torch.sub(log_p, log_q, out=x).mul_(p).sum(-1)
            r = p.neg_()
            return f, r.sum(-1), None, r
        case "rkl":
            d = torch.sub(log_q, log_p, out=x)
            f = torch.mul(d, q, out=y).sum(-1)
            return f, f, d, None
        case "symmetric_kl":
            half_d, p = torch.sub(log_q, log_p, out=x).mul_(0.5), log_p.exp_()
            reverse = torch.mul(half_d, q, out=y).sum(-1)
            forward = torch.mul(half_d, p, out=y).sum(-1)
            r = p.mul_(-0.5)
            return reverse - forward, reverse + r.sum(-1), half_d, r
        case "tvd":
            difference = torch.sub(q, torch.exp(log_p, out=x), out=x)
            f = torch.abs(difference, out=y).sum(-1).mul_(0.5)
            h = difference.sign_().mul_(0.5)
            return f, torch.mul(h, q, out=y).sum(-1), h, None
        case "skl":
            u, rest = _log_share(torch.sub(log_q, log_p, out=x), spec.alpha if alpha is None else alpha, y)
            p = log_p.exp_()
            f = u.mul_(p).sum(-1)
            r = rest.mul_(p).neg_()
            return f, r.sum(-1), None, r
        case "srkl":
            u, rest = _log_share(torch.sub(log_p, log_q, out=x), spec.alpha if alpha is None else alpha, y)
            f = torch.mul(u, q, out=log_p).sum(-1)
            h = u.add_(rest)
            return f, torch.mul(h, q, out=log_p).sum(-1), h, None
        case "jsd":
            # The student's term comes first: the teacher's is written over log_q.
            beta = spec.beta
            h = _log_share(torch.sub(log_p, log_q, out=x), 1.0 - beta, y)[0].mul_(1.0 - beta)
            g = torch.mul(h, q, out=x).sum(-1)
            u = _log_share(torch.sub(log_q, log_p, out=x), beta, log_q)[0]
            return g + u.mul_(log_p.exp_()).sum(-1).mul_(beta), g, h, None
        case "abkd":
            a, b = spec.alpha, spec.beta
            cross = torch.mul(log_p, a, out=x).add_(log_q, alpha=b).exp_()
            own_q = torch.mul(log_q, a + b, out=y).exp_()
            own = log_p.mul_(a + b).exp_().mul_(a / (a + b)).add_(own_q, alpha=b / (a + b))
            f = own.sub_(cross).sum(-1) / (a * b)
            r = own_q.sub_(cross).div_(a)
            return f, r.sum(-1), None, r
        case "akl":
            d, p = torch.sub(log_q, log_p, out=x), torch.exp(log_p, out=y)
            forward = torch.mul(d, p, out=log_q).sum(-1).neg_()
            reverse = torch.mul(d, q, out=log_q).sum(-1)
            return forward, reverse, d, p.neg_()
    raise AssertionError(spec.name)


def add_head_errors(state: Tensor, log_p: Tensor, q: Tensor, in_head: Tensor) -> None:
    """Adds akl's sums of abs(p - q) in the teacher's head and outside of it to the state; log_p is kept."""
    error = log_p.exp().sub_(q).abs_()
    head = (error * in_head).sum(-1)
    state[Row.SUM_2] += head
    state[Row.SUM_3] += error.masked_fill_(in_head, 0.0).sum(-1)


def _log_share(d: Tensor, alpha: float | Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """u = log(own / m) and the other part's share (1-a) other / m of a mixture m = a own + (1-a) other, from
    d = log other - log own.

    u overwrites `u`, the share overwrites `d`. Each is taken from logarithms, so neither cancels; exact at a = 0.
    """
    alpha = torch.as_tensor(alpha, dtype=d.dtype, device=d.device)
    log_own, other = alpha.log(), d.add_((-alpha).log1p())
    torch.logaddexp(log_own.expand_as(other), other, out=u).neg_()
    return u, other.sub_(log_own).sigmoid_()


def _interpolate(s: Tensor, t: Tensor, alpha: Tensor, out: Tensor) -> Tensor:
    return torch.lerp(s, t, alpha.expand_as(s), out=out)


def _merge(
    state: Tensor, largest: Row, totals: tuple[Row | None, Row], z: Tensor, temperature: float, x: Tensor
) -> None:
    """Running maximum and sums of exponentials of logits z, at temperature 1 (where wanted) and at T; x is used up."""
    old = state[largest].clone()
    new = torch.maximum(old, z.amax(-1))
    torch.sub(z, new.unsqueeze(-1), out=x)
    at_one, at_t = totals
    if temperature == 1.0:
        total = state[at_t] * (old - new).exp() + x.exp_().sum(-1)
        state[at_t] = total
        if at_one is not None:
            state[at_one] = total
    else:
        if at_one is not None:
            state[at_one] = state[at_one] * (old - new).exp() + x.exp().sum(-1)
        state[at_t] = state[at_t] * ((old - new) / temperature).exp() + x.div_(temperature).exp_().sum(-1)
    state[largest] = new
