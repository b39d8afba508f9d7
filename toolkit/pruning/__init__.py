"""Students made out of their teachers: layers left out, hidden units, heads and MLP channels cut. Imports
data, divergences, models, ranks, settings and storage.

`prune` does all of it; `depth` and `width` choose, `weights` reads and runs a model layer by layer, `write` streams the
result and tries it out.
"""

from toolkit.pruning.prune import leave_out_layers, prune

__all__ = ["leave_out_layers", "prune"]
