"""What `toolkit/models/zero.py` relies on, tried on real engines of the installed DeepSpeed.

The functions named `check_...` run on every rank; a rank whose assertion fails fails the test with its traceback.
"""

import ast
import contextlib
import gc
import re
import weakref
from pathlib import Path

import deepspeed
import pytest
import torch
from torch import nn

from toolkit.models import zero
from toolkit.ranks import collectives

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 5  # 25 elements of a weight, so that the second of two ranks has a padded share
SMALL = 8  # at most so many elements: ZeRO-3 keeps the biases gathered


class Layer(nn.Module):
    """Two linear layers; `whole` says of the last pass whether all weights were there as it began."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden):
        self.whole = all(map(zero.is_whole, self.parameters()))
        return hidden + self.down(torch.tanh(self.up(hidden)))


class Model(nn.Module):
    """A model as far as `zero` knows of any: layers, a frozen scale, and a dtype."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.scale = nn.Parameter(torch.full((WIDTH, 2), 1 / 3), requires_grad=False)
        self.register_buffer("shift", torch.full((WIDTH,), 1 / 3))

    @property
    def dtype(self):
        return self.layers[0].up.weight.dtype

    def forward(self, hidden):
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden * self.scale[:, 0].to(hidden.dtype)


class Loss(nn.Module):
    """The sum of a model's output: its gradient adds up over inputs."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, hidden):
        return self.model(hidden).sum()


def settings(stage, dtype=torch.float32, accumulates=None, **more):
    sharding = {"stage": stage} | ({"stage3_param_persistence_threshold": SMALL} if stage == 3 else {})
    return {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 4, "gradient_clipping": 0.0,
        "zero_optimization": sharding | more, "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == torch.bfloat16, "check_grad_overflow": True}, "steps_per_print": 10**9,
        "data_types": {"grad_accum_dtype": accumulates},
    }  # fmt: skip


def made(seed=0):
    torch.manual_seed(seed)
    return Model()


def started(stage, optimizer=torch.optim.SGD, prepare=lambda model: None, **more):
    """(an engine, its weights as they were made, by name). optimizer: a class, by default plain gradient descent, or
    None for a model that is not trained."""
    weights = {name: parameter.detach() for name, parameter in made().named_parameters()}
    config = settings(stage, **more)
    with deepspeed.zero.Init(config_dict_or_path=config) if stage == 3 else contextlib.nullcontext():
        model = made()
    prepare(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trains = optimizer and optimizer(trained, lr=1.0)
    return zero.initialize(Loss(model), config, trains), weights


def weights_of(engine):
    """All parameters, gathered, by name."""
    with zero.gathered(engine.module.model.parameters()):
        return {name: p.detach().clone() for name, p in engine.module.model.named_parameters()}


def row(seed):
    """An input of its own for every seed."""
    return torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def released(engine):
    try:
        yield engine
    finally:
        zero.release([engine])


def check_parameters(stage):
    engine, weights = started(stage)
    with released(engine):
        named = dict(engine.module.model.named_parameters())
        assert {zero.is_partitioned(p) for p in named.values()} == {stage == 3}
        for name, parameter in named.items():
            assert zero.whole_shape(parameter) == weights[name].shape, name
            assert zero.whole_numel(parameter) == weights[name].numel(), name
            # Before the first pass ZeRO-3 has partitioned the small parameters as well.
            assert zero.is_whole(parameter) == (stage < 3), name
        for name, whole in weights_of(engine).items():
            assert torch.equal(whole, weights[name]), name


def check_gathered():
    engine, weights = started(3)
    with released(engine):
        weight = engine.module.model.layers[0].up.weight
        plain = nn.Parameter(torch.ones(3))
        if collectives.rank() == 0:  # no collective: the other rank does not take part
            with zero.gathered([plain]):
                assert plain.tolist() == [1, 1, 1]
        with zero.gathered([weight, plain, weight]):
            weight.data.zero_()
            with pytest.raises(RuntimeError, match="cannot overlap"), zero.gathered([weight]):
                pass
        assert not zero.is_whole(weight)
        with zero.gathered([weight]):
            assert torch.equal(weight, weights["layers.0.up.weight"]), "what was written is lost"


def check_borrowed():
    class Borrower(Loss):
        def forward(self, hidden):
            weight = zero.borrow(self.model.layers[1].up, "weight")
            assert zero.borrow(self.model, "no_such_name") is None
            return (self.model.layers[0](hidden) @ weight.t()).sum()

    model = made()
    wanted = torch.autograd.grad((model.layers[0](row(0)) @ model.layers[1].up.weight.t()).sum(),
                                 model.layers[0].up.weight)[0]  # fmt: skip
    before = model.layers[0].up.weight.detach().clone()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = settings(3) | {"gradient_accumulation_steps": 1}
    engine = zero.initialize(Borrower(model), config, torch.optim.SGD(trained, lr=1.0))
    with released(engine):
        engine.backward(engine(row(0)))
        engine.step()
        torch.testing.assert_close(before - weights_of(engine)["layers.0.up.weight"], wanted)
        assert not zero.is_whole(model.layers[1].up.weight), "it is released after its backward pass"


def check_dtypes_under_init():
    wanted = {"layers.0.up.weight": torch.float32, "shift": torch.float32}
    config = settings(3, torch.bfloat16)
    with zero.dtypes_under_init(wanted), deepspeed.zero.Init(config_dict_or_path=config):
        model = Model()
    assert deepspeed.zero.Init.__module__.startswith("deepspeed."), "DeepSpeed's own class is back"
    with zero.gathered(model.parameters()):
        named = [*model.named_parameters(), *model.named_buffers()]
        assert {n: t.dtype for n, t in named} == {n: wanted.get(n, torch.bfloat16) for n, _ in named}
    weight = model.layers[0].up.weight
    assert zero.whole_shape(weight) == (WIDTH, WIDTH) and weight.ds_tensor.dtype == torch.float32
    zero.set_dtype(weight, torch.bfloat16)
    assert weight.ds_tensor.dtype == torch.bfloat16 and not zero.is_whole(weight)


def check_set_dtype_keeps_values():
    with deepspeed.zero.Init(config_dict_or_path=settings(3)):
        model = made()
    weight = model.layers[0].up.weight
    with zero.gathered([weight]):
        before = weight.detach().clone()
    zero.set_dtype(weight, torch.bfloat16)
    with zero.gathered([weight]):
        assert torch.equal(weight, before.bfloat16())


def check_frozen_parameters_keep_their_dtype(stage):
    """As transformers loads a model: one parameter in fp32 among others in bf16."""
    config = settings(stage, torch.bfloat16)
    if stage == 3:
        with zero.dtypes_under_init({"scale": torch.float32}), deepspeed.zero.Init(config_dict_or_path=config):
            model = Model()
        with deepspeed.zero.GatheredParameters([model.scale], modifier_rank=0):  # as weights are read into it
            model.scale.data.fill_(1 / 3)
    else:
        model = Model()
        model.layers.bfloat16()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine = zero.initialize(Loss(model), config, torch.optim.SGD(trained, lr=1.0))
    with released(engine):
        dtypes = {name: weight.dtype for name, weight in weights_of(engine).items()}
        assert dtypes.pop("scale") == torch.float32 and {*dtypes.values()} == {torch.bfloat16}
        assert weights_of(engine)["scale"].eq(torch.tensor(1 / 3)).all()
        engine.backward(engine(row(0).bfloat16()))


def check_gathered_at_once():
    for at_once in (False, True):
        engine, _ = started(
            3, optimizer=None, stage3_param_persistence_threshold=0,
            prepare=lambda model, at_once=at_once: zero.gather_at_once(model, model.layers) if at_once else None,
        )  # fmt: skip
        with released(engine), torch.no_grad():
            engine(row(0))
            assert [layer.whole for layer in engine.module.model.layers] == [at_once, at_once]


def check_passes_without_hooks(optimizer):
    def count(model):
        return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())

    engine, weights = started(3, optimizer=optimizer)
    with released(engine):
        model, offload = engine.module.model, engine.optimizer.parameter_offload if optimizer else engine.optimizer
        before, handles = count(model), (len(offload.forward_hooks), len(offload.backward_hooks))
        for _ in range(3):
            with zero.gathered_without_hooks(engine), torch.no_grad():
                assert count(model) == 0 and all(map(zero.is_whole, model.parameters()))
                for _ in range(3 * collectives.rank()):  # the ranks make other numbers of passes
                    model(row(0))
        assert count(model) == before and len(zero.FWD_MODULE_STACK) == 1
        assert (len(offload.forward_hooks), len(offload.backward_hooks)) == handles
        assert not zero.is_whole(model.layers[0].up.weight)
        with torch.no_grad():
            found = engine(row(0))
        torch.testing.assert_close(found, Loss(made())(row(0)))
        if optimizer:
            step(engine, 2)
            torch.testing.assert_close(weights_of(engine), descended(weights, 2))


def step(engine, micro_batches, poisoned_rank=None):
    """An optimizer step on the sum of this many losses of each rank; returns the weights before its last one."""
    rank = collectives.rank()
    for index in range(micro_batches):
        is_last = index == micro_batches - 1
        before = weights_of(engine)
        zero.begin_micro_batch(engine, is_last=is_last)
        loss = engine(row(10 * index + rank).to(engine.module.model.dtype)) * zero.loss_divisor(engine)
        engine.backward(loss * float("nan") if is_last and rank == poisoned_rank else loss)
        engine.step()
    return before


def descended(weights, micro_batches):
    """The same step without DeepSpeed."""
    model, ranks = made(), range(collectives.world())
    sum(Loss(model)(row(10 * index + rank)) for index in range(micro_batches) for rank in ranks).backward()
    return {name: weights[name] if p.grad is None else weights[name] - p.grad for name, p in model.named_parameters()}


def check_a_step(stage, **more):
    engine, weights = started(stage, **more)
    with released(engine):
        for micro_batches in (3, 5):  # neither is the configuration's number, which is 4
            torch.testing.assert_close(step(engine, micro_batches), weights, rtol=0, atol=0)
            wanted = descended(weights, micro_batches)
            assert zero.was_step_taken(engine)
            torch.testing.assert_close(weights_of(engine), wanted)
            norm = torch.cat([(wanted[name] - weights[name]).flatten() for name in weights]).norm()
            assert zero.gradient_norm(engine) == pytest.approx(float(norm), rel=1e-5)
            write(engine, weights)  # back to the start
        step(engine, 2, poisoned_rank=collectives.world() - 1)
        assert not zero.was_step_taken(engine) and zero.gradient_norm(engine) == float("inf")
        torch.testing.assert_close(weights_of(engine), weights, rtol=0, atol=0)


def check_sums_in_fp32(stage):
    """64 gradients in bf16: their sum in fp32 is off by what each was rounded, in bf16 by what the sum was too."""
    count, errors = 64, {}
    for dtype in ("fp32", "bf16"):
        engine, weights = started(stage, dtype=torch.bfloat16, accumulates=dtype)
        with released(engine):
            pieces = [(piece, piece.flat.detach().clone()) for piece in zero.owned(engine)]
            step(engine, count)
            wanted = descended({name: weight.bfloat16().float() for name, weight in weights.items()}, count)
            parts = []
            for piece, before in pieces:
                name, end = piece.name.removeprefix("model."), piece.start + piece.numel
                exact = (weights[name].bfloat16().float() - wanted[name]).flatten()[piece.start : end]
                found = (before - piece.flat).narrow(0, piece.at, piece.numel)
                parts.append([(found - exact).square().sum().item(), exact.square().sum().item()])
            off, whole = collectives.sum_over_ranks([sum(part[i] for part in parts) for i in (0, 1)])
            errors[dtype] = (off / whole) ** 0.5
    assert errors["fp32"] < 0.004 < 0.008 < errors["bf16"], errors


def write(engine, weights):
    """These weights into the engine's fp32 copies and on into what it computes with."""
    with torch.no_grad():
        for piece in zero.owned(engine):
            values = weights[piece.name.removeprefix("model.")].flatten()[piece.start : piece.start + piece.numel]
            piece.flat.narrow(0, piece.at, piece.numel).copy_(values)
    zero.load_weights_from_masters(engine)


def check_owned_pieces(stage):
    engine, weights = started(stage, optimizer=torch.optim.AdamW)
    with released(engine):
        step(engine, 1)  # ZeRO-3 keeps the biases gathered from now on
        write(engine, weights)
        states = zero.inner_optimizer(engine).state
        covered = {name: torch.zeros(p.numel(), dtype=int) for name, p in weights.items() if name != "scale"}
        for piece in zero.owned(engine):
            name, end = piece.name.removeprefix("model."), piece.start + piece.numel
            covered[name][piece.start : end] += 1
            assert piece.flat.dtype == torch.float32 and states[piece.flat]["exp_avg"].shape == piece.flat.shape
            values = piece.flat.narrow(0, piece.at, piece.numel)
            assert torch.equal(values, weights[name].flatten()[piece.start : end]), name
        for name, counts in covered.items():
            total = sum(part[name] for part in collectives.gather_objects(covered))
            assert total.eq(1).all(), f"each element of {name} is owned by one rank"
            assert stage < 3 or 0 < counts.sum() < len(counts), f"both ranks own a part of {name}"
        other = {name: torch.arange(p.numel()).view(p.shape).float() for name, p in weights.items()}
        write(engine, other)
        small = [p for p in engine.module.model.parameters() if p.requires_grad and zero.whole_numel(p) <= SMALL]
        assert all(map(zero.is_whole, small)), "small parameters are gathered again"
        found = weights_of(engine)
        for name in covered:
            assert torch.equal(found[name], other[name]), name
        # A pass computes with them too: where small parameters stay gathered, with those.
        wanted = Loss(made())
        wanted.model.load_state_dict(other | {"scale": weights["scale"], "shift": wanted.model.shift})
        with torch.no_grad():
            torch.testing.assert_close(engine(row(0)), wanted(row(0)))


def check_pieces_of_what_is_not_sharded():
    engine, _ = started(0)
    with pytest.raises(ValueError, match="ZeRO stage 0, and checkpoints are made of stages 1, 2 and 3"):
        list(zero.owned(engine))


def check_nothing_is_left(partition_size):
    """The second engine would be refused if hpZ's groups of the first were there."""
    for _ in range(2):
        engine, _ = started(3, zero_hpz_partition_size=partition_size)
        for _ in range(3):  # from the second on, ZeRO-3 knows the order of the modules
            engine.backward(engine(row(0)))
        held = [weakref.ref(part) for part in (engine, engine.module, engine.optimizer)]
        zero.release([engine])
        del engine
        gc.collect()
        assert [part() for part in held] == [None, None, None]


@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", [2, 3])
def test_parameters_have_their_whole_shapes_and_values(ranks2, stage):
    ranks2.run(check_parameters, stage)


@pytest.mark.multiprocess
def test_gathered_parameters_are_whole_and_what_is_written_is_lost(ranks2):
    ranks2.run(check_gathered)


@pytest.mark.multiprocess
def test_a_pass_may_borrow_a_parameter_of_a_module_that_it_does_not_call(ranks2):
    ranks2.run(check_borrowed)


@pytest.mark.multiprocess
def test_partitioned_parameters_change_their_dtype(ranks2):
    ranks2.run(check_dtypes_under_init)
    ranks2.run(check_set_dtype_keeps_values)


@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", [2, 3])
def test_frozen_parameters_keep_their_dtype(ranks2, stage):
    ranks2.run(check_frozen_parameters_keep_their_dtype, stage)


@pytest.mark.multiprocess
def test_layers_are_gathered_at_once(ranks2):
    ranks2.run(check_gathered_at_once)


@pytest.mark.multiprocess
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, None], ids=["a student's engine", "a teacher's engine"])
def test_ranks_make_passes_of_their_own_without_hooks(ranks2, optimizer):
    ranks2.run(check_passes_without_hooks, optimizer)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("stage", "more"), [(2, {}), (3, {}), (3, {"zero_hpz_partition_size": 2})], ids=["2", "3", "3 with hpZ"]
)
def test_a_step_of_any_number_of_micro_batches_follows_plain_torch(ranks2, stage, more):
    ranks2.run(check_a_step, stage, **more)


@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_of_many_micro_batches_add_up_in_fp32(ranks2, stage):
    ranks2.run(check_sums_in_fp32, stage)


@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_each_element_has_one_owner_and_is_computed_with_once_written(ranks2, stage):
    ranks2.run(check_owned_pieces, stage)


@pytest.mark.multiprocess
def test_an_engine_without_sharding_has_no_pieces(ranks2):
    ranks2.run(check_pieces_of_what_is_not_sharded)


@pytest.mark.multiprocess
def test_released_engines_leave_nothing_behind(ranks2):
    for partition_size in (1, 2):
        ranks2.run(check_nothing_is_left, partition_size)


def test_the_version_that_was_read_is_the_one_that_is_installed():
    """Where it changes: read the new version for what each function of zero.py relies on."""
    pinned = re.search(r"^deepspeed==(.+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)[1]
    assert deepspeed.__version__.partition("+")[0] == pinned == zero.VERSION


#: files that may know DeepSpeed's insides
INSIDERS = ("models/zero.py", "ranks/builds.py", "ranks/gathers.py")
#: what all others may use of DeepSpeed: documented names
DOCUMENTED = {
    "deepspeed.DeepSpeedEngine", "deepspeed.accelerator.get_accelerator", "deepspeed.comm.destroy_process_group",
    "deepspeed.init_distributed",
    "deepspeed.monitor.config.get_monitor_config", "deepspeed.monitor.monitor.MonitorMaster",
    "deepspeed.ops.adam.DeepSpeedCPUAdam", "deepspeed.runtime.rollout.RolloutBatch",
    "deepspeed.runtime.rollout.RolloutEngine", "deepspeed.runtime.rollout.RolloutRequest",
    "deepspeed.runtime.rollout.SamplingConfig",
}  # fmt: skip
#: methods and attributes of an engine that are not for others, whatever the engine is called there
OF_ENGINES = re.compile(
    r"_z3_leaf|ds_(tensor|shape|numel|status|id|persist|secondary_tensor|process_group)|_hp_mapping|grad_position|"
    r"(set|is)_gradient_accumulation_boundary|gradient_accumulation_steps|was_step_applied|get_global_grad_norm|"
    r"parameter_offload|persistent_parameters|fp32_partitioned_groups_flat|single_partition_of_fp32_groups"
)


def uses_of_deepspeed(source):
    """Full names of what a file takes from DeepSpeed, and the engine's insides by their bare names."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("deepspeed"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            others = (alias for alias in node.names if alias.name != "deepspeed" or alias.asname)
            found |= {alias.name for alias in others if alias.name.split(".")[0] == "deepspeed"}
        elif isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if text.startswith("deepspeed."):
                found.add(text)
            if OF_ENGINES.fullmatch(node.attr) or text.endswith(".optimizer.optimizer"):
                found.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            name = getattr(node.args[1], "value", "")
            found |= {name} if isinstance(name, str) and OF_ENGINES.fullmatch(name) else set()
    # Of a.b.c the parts a.b are no uses of their own.
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


def test_no_other_file_knows_deepspeeds_insides():
    for path in sorted((ROOT / "toolkit").rglob("*.py")):
        name = path.relative_to(ROOT / "toolkit").as_posix()
        if name not in INSIDERS:
            assert uses_of_deepspeed(path.read_text()) <= DOCUMENTED, name


@pytest.mark.parametrize("source", [
    "import deepspeed\nwith deepspeed.zero.GatheredParameters([]): pass", "import deepspeed as ds",
    "from deepspeed.runtime.zero import partition_parameters", "import deepspeed.runtime.engine",
    "import deepspeed\ndeepspeed.utils.groups._WORLD_GROUP", "p.ds_tensor", "getattr(p, 'ds_numel', 0)",
    "engine.optimizer.optimizer.state", "engine.was_step_applied()",
])  # fmt: skip
def test_insides_are_seen(source):
    assert not uses_of_deepspeed(source) <= DOCUMENTED
