"""The generators of a process as tensors, for checkpoints."""

import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def rng_state() -> dict[str, Tensor]:
    """The state of every generator of this process, as tensors."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    assert kind == "MT19937"
    version, words, next_gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.array([*keys, position, has_gauss], np.int64)),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "gauss": torch.tensor([gauss, float("nan") if next_gauss is None else next_gauss], dtype=torch.float64),
    }
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def load_rng_state(state: Mapping[str, Tensor]) -> None:
    """Sets every generator of this process to what `rng_state` returned."""
    gauss, next_gauss = state["gauss"].tolist()
    *keys, position, has_gauss = state["numpy"].tolist()
    version, *words = state["python"].tolist()
    torch.set_rng_state(state["torch"])
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, gauss))
    random.setstate((version, tuple(words), None if next_gauss != next_gauss else next_gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
