"""DeepSpeed's insides: what the project relies on beyond DeepSpeed's documented calls stands here and nowhere else.

Every function says which behaviour of DeepSpeed 0.19.8 it relies on. `tests/models/test_zero.py` tries each of them on
real engines, so that a version which behaves otherwise fails a test by that function's name. Two such places lie
outside of this file, `toolkit/ranks/builds.py` and `cpus.py`, as ranks start before any model is there.

"Partitioned" is a parameter of which ZeRO-3 keeps one part on each rank; its `data` is then an empty tensor.
"""

import functools
import gc
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from torch import Tensor, nn

from toolkit.ranks import collectives

#: the version whose sources were read for this file, and which requirements.txt installs
VERSION = "0.19.8"


# Parameters


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 manages the parameter, gathered at the moment or not."""
    # 0.19.8: zero.Init and deepspeed.initialize put attributes named ds_* on each parameter that they partition.
    return hasattr(parameter, "ds_tensor")


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape that the parameter has when it is gathered."""
    # 0.19.8: the `shape` of a partitioned parameter is (0,); `ds_shape` is what it was made with.
    return getattr(parameter, "ds_shape", parameter.shape)


def whole_numel(parameter: nn.Parameter) -> int:
    """The number of elements that the parameter has when it is gathered."""
    return whole_shape(parameter).numel()


def is_whole(parameter: nn.Parameter) -> bool:
    """Whether all elements are on this rank: not partitioned, gathered, or small enough to stay gathered."""
    return parameter.numel() == whole_numel(parameter)


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, the parameters are whole on every rank. What is written into them is lost. Collective to enter. Raises
    RuntimeError for a parameter that an outer `gathered` holds already."""
    # 0.19.8: parameters that are not partitioned are passed over, and a list without any partitioned one is no
    # collective. With modifier_rank=None nothing is broadcast on the way out.
    with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=None):
        yield


def borrow(module: nn.Module, name: str) -> Any:
    """The parameter `name` of a module that the forward pass at hand does not call, whole until the end of that pass
    and again in its backward pass; None where the module has none. Collective."""
    # 0.19.8: reading a partitioned parameter as an attribute, inside of a forward pass, gathers it and registers it as
    # an "external" parameter of the module whose pass it is.
    return getattr(module, name, None)


def set_dtype(parameter: nn.Parameter, dtype: torch.dtype) -> None:
    """Change a parameter's dtype, also where it is partitioned. Collective; to be called before an engine holds it."""
    if not is_partitioned(parameter):
        parameter.data = parameter.data.to(dtype)
        return
    # 0.19.8: `partition` copies values into `ds_tensor` where that is there, in the dtype that it has, and makes a new
    # one of the parameter's own dtype where it is None. hpZ's second copy, `ds_secondary_tensor`, goes likewise.
    partitioned: Any = parameter
    partitioned.all_gather()
    partitioned.data = partitioned.data.to(dtype)
    partitioned.ds_tensor = partitioned.ds_secondary_tensor = None
    partitioned.partition()


@contextmanager
def dtypes_under_init(wanted: Mapping[str, torch.dtype]) -> Iterator[None]:
    """While it lasts, a model that is made under zero.Init has these dtypes of parameters and buffers, by name, before
    any weight is read into it."""
    # 0.19.8: inside of zero.Init every new tensor gets the run's precision, and `_post_init_method` is called for each
    # module as its constructor returns, so last for the whole model. transformers opens `deepspeed.zero.Init` by that
    # name while it loads a model, which is why a class of our own has to stand there.
    original = deepspeed.zero.Init

    class Init(original):  # type: ignore[misc, valid-type]
        def _post_init_method(self, module: nn.Module) -> None:
            super()._post_init_method(module)
            self.made = module

        def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
            super().__exit__(kind, error, trace)
            if kind is None:
                _set_dtypes(self.made, wanted)

    deepspeed.zero.Init = Init
    try:
        yield
    finally:
        deepspeed.zero.Init = original


def _set_dtypes(model: nn.Module, wanted: Mapping[str, torch.dtype]) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dtype != wanted.get(name, parameter.dtype):
            set_dtype(parameter, wanted[name])
    for name, buffer in model.named_buffers():
        buffer.data = buffer.data.to(wanted.get(name, buffer.dtype))


# Engines


def initialize(
    module: nn.Module, ds_config: Mapping[str, Any], optimizer: torch.optim.Optimizer | None = None
) -> deepspeed.DeepSpeedEngine:
    """A DeepSpeed engine of `module`. Frozen parameters of `module.model` that have another dtype than the model keep
    it; for ZeRO-3 the model has to be made under zero.Init. Collective."""
    # 0.19.8: deepspeed.initialize casts all parameters of a module that zero.Init did not make to the engine's
    # precision, frozen ones as well. Those that zero.Init made it leaves alone.
    # So they are put aside, and put back into the module that the engine holds.
    model = module.get_submodule("model")
    others = (p for p in model.parameters() if p.dtype != model.dtype and not is_partitioned(p))
    kept = [(parameter, parameter.data) for parameter in others if not parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=dict(ds_config))
    for parameter, data in kept:
        parameter.data = data.to(parameter.device)
    if hasattr(engine.optimizer, "single_partition_of_fp32_groups"):
        _leave_out_passes(engine.optimizer)
    return engine


def _leave_out_passes(optimizer: Any) -> None:
    """Passes over all gradients of a ZeRO-1 or 2 step that say or do what another one does anyway."""
    # 0.19.8: a step looks at each gradient for what is not finite, and then computes their norm, which is not finite
    # either where one of them is not; both leave the step out, by `overflow`.
    optimizer.check_overflow = lambda partition_gradients=True: None
    # 0.19.8: gradients are divided by the number of ranks, in a pass of its own. `loss_divisor` leaves that out.
    optimizer.gradient_average = False
    # 0.19.8: each gradient is made float64 for its norm. Torch's norm adds up in fp32 whatever it reads.
    # With offload the norms are taken as gradients are sent, and stay as they are.
    if not optimizer.cpu_offload:
        optimizer.scaled_global_norm = functools.partial(_norm_of_gradients, optimizer)
    # 0.19.8: gradients are multiplied by the clipping's factor also where that is 1.
    multiply = optimizer.unscale_and_clip_grads

    def clip(gradients: list[Tensor], norm: Tensor | None) -> None:
        if norm is None or optimizer.loss_scale != 1 or not 0 <= norm <= optimizer.clip_grad:
            multiply(gradients, norm)

    optimizer.unscale_and_clip_grads = clip


def _norm_of_gradients(optimizer: Any, norm_type: int = 2) -> Tensor:
    """The norm of the gradient over all ranks; -1, as DeepSpeed says it, where it is not finite. Collective."""
    gradients = [part for parts in optimizer.averaged_gradients.values() for part in parts]
    squares = [torch.linalg.vector_norm(part, dtype=torch.float32).square() for part in gradients]
    total = torch.stack(squares).sum()
    torch.distributed.all_reduce(total, group=optimizer.dp_process_group)
    return torch.where(total.isfinite(), total.sqrt(), -1.0)


def gather_at_once(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Let ZeRO-3 gather each of these layers of `model` as a whole, so that nothing inside of a layer communicates. To
    be called before `initialize`."""
    # 0.19.8: a "leaf module" gets hooks of its own and its parts get none. Modules are told by their class.
    deepspeed.utils.set_z3_leaf_modules(model, list({type(layer) for layer in layers}))


@contextmanager
def gathered_without_hooks(engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    """Inside, the parameters of the engine's `module.model` are whole, and its passes neither gather nor release any:
    ranks may make as many passes as each of them likes. Collective to enter and to leave."""
    if engine.zero_optimization_stage() < 3:
        yield
        return
    # 0.19.8: ZeRO-3's hooks gather and release each layer in each pass, whether it was gathered before or not.
    # An engine without an optimizer keeps the hooks' owner where others have the optimizer. It removes its hooks, but
    # keeps their dead handles, and each set-up pushes the module onto the stack of modules in a forward pass once more.
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    with gathered(engine.module.model.parameters()):
        offload._remove_module_hooks()
        offload.forward_hooks.clear()
        offload.backward_hooks.clear()
        FWD_MODULE_STACK.pop()
        try:
            yield
        finally:
            offload.setup_zero_stage3_hooks()


def release(engines: Iterable[deepspeed.DeepSpeedEngine]) -> None:
    """End these engines, and undo what would hold their memory afterwards: the garbage collector finds the rest. New
    engines may then be made in this process."""
    # 0.19.8: `destroy` removes hooks and gradient buckets. The stack of modules in a forward pass still holds the
    # modules, and methods under functools.lru_cache hold their engines' parts.
    for engine in engines:
        engine.destroy()
    FWD_MODULE_STACK.clear()
    for found in gc.get_objects():
        # Compared by type(): isinstance asks objects for their class, and some warn when they are touched.
        if type(found) is functools._lru_cache_wrapper and found.__module__.startswith("deepspeed."):
            found.cache_clear()
    # 0.19.8: hpZ's group of ranks is made once in a process, and the next zero.Init is refused while there is one.
    deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


# One optimizer step


def loss_divisor(engine: deepspeed.DeepSpeedEngine) -> int:
    """What a sum of losses over all micro-batches and ranks is divided by on its way to the gradient."""
    # 0.19.8: `backward` divides each loss by the configuration's number of micro-batches, however many there are, and
    # gradients are averaged over ranks, unless `initialize` has turned that off.
    averages = getattr(engine.optimizer, "gradient_average", True)
    return engine.gradient_accumulation_steps() * (collectives.world() if averages else 1)


def begin_micro_batch(engine: deepspeed.DeepSpeedEngine, *, is_last: bool) -> None:
    """Tell the engine, before each forward pass of a training step, whether `step` is to be taken after this one."""
    # 0.19.8: once told, it no longer counts micro-batches, so that each step may have another number of them.
    engine.set_gradient_accumulation_boundary(is_last)


def was_step_taken(engine: deepspeed.DeepSpeedEngine) -> bool:
    """Whether the last `step` changed weights; alike on all ranks."""
    # 0.19.8: a step is left out on all ranks where the gradient is not finite on any: by ZeRO-3 always, by ZeRO-1 and
    # 2 in fp32 always, and in bf16 with `check_grad_overflow`.
    return engine.was_step_applied()


def gradient_norm(engine: deepspeed.DeepSpeedEngine) -> float:
    """The norm of the last step's gradient over all ranks, before clipping; inf where the step was left out."""
    return float(engine.get_global_grad_norm() or 0.0)


# Master weights and optimizer states


class Owned(NamedTuple):
    """What a rank owns of a parameter: elements [start, start + numel) of the flattened parameter `name` are elements
    [at, at + numel) of `flat`, fp32, which the optimizer trains."""

    name: str
    start: int
    flat: Tensor
    at: int
    numel: int


def inner_optimizer(engine: deepspeed.DeepSpeedEngine) -> torch.optim.Optimizer:
    """The optimizer that was handed to `initialize`. Its states are those of the `flat` tensors of `owned`, and have
    their shapes; a learning rate is that of its groups."""
    # 0.19.8: ZeRO's optimizer wraps it, and has it train flat fp32 copies in the place of the parameters.
    return engine.optimizer.optimizer


def owned(engine: deepspeed.DeepSpeedEngine) -> Iterator[Owned]:
    """The pieces of trained parameters whose fp32 copies are on this rank; nothing is communicated. Raises ValueError
    for an optimizer on NVMe, and for another ZeRO stage than 1, 2 and 3."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    named = [(name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad]
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        if getattr(optimizer, "swap_optimizer", False):
            raise ValueError("the student's optimizer is offloaded to NVMe, which checkpoints cannot read; use cpu")
        for name, parameter in named:
            # 0.19.8, ZeRO-3: rank r owns the r-th of equal shares of each parameter, and the last shares are padded.
            group, at, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = share * optimizer._get_param_partition_rank(parameter)
            numel = min(share, whole_numel(parameter) - start)
            if numel > 0:
                yield Owned(name, start, optimizer.fp32_partitioned_groups_flat[group], at, numel)
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):
        for name, parameter in named:
            # 0.19.8, ZeRO-1 and 2: a group of parameters is flattened and cut into one part for each rank, so a
            # parameter may lie on one rank, on several, or begin on one and end on the next.
            if (mapping := parameter._hp_mapping) is not None:
                flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
                ours, theirs = mapping.hp_fragment_address, mapping.lp_fragment_address
                yield Owned(name, theirs.start, flat, ours.start, ours.numel)
    else:
        raise ValueError(
            f"the student's DeepSpeed config has ZeRO stage {stage}, and checkpoints are made of stages 1, 2 and 3; "
            "set zero_optimization.stage, for example with ds_configs/student_zero2.json"
        )


def load_weights_from_masters(engine: deepspeed.DeepSpeedEngine) -> None:
    """Make the weights that training computes with those of the fp32 copies, which somebody has written. Collective."""
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer.update_lp_params()
        return
    # 0.19.8, ZeRO-3: small parameters stay gathered between steps. Their whole copies and hpZ's hold the weights of
    # before: they are dropped, and the small ones are gathered again.
    optimizer._partition_all_parameters()
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    optimizer.invalidate_secondary_tensor()
