"""SReLU: values and gradients against the paper, freezing, weight decay, checkpoints, the exported graph."""

from __future__ import annotations

import copy
import runpy
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from helpers import FIRST, SECOND, assert_says, change_tensors, refusal, set_fields, split_shard, strict_json
from hypothesis import given, settings
from hypothesis import strategies as st

from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.checkpoint.config import ModelConfig, ProjectorConfig
from sfexport.demo.run import DemoPaths as Tree
from sfexport.errors import CheckpointError
from sfexport.graphs.vision_encoder import write_projector
from sfexport.graphs.writer import GraphWriter
from sfexport.testing.random_checkpoint import write_random_checkpoint

torch = pytest.importorskip("torch")

from transformers import AutoConfig, AutoModelForCausalLM, TrainerControl, TrainerState, TrainingArguments  # noqa: E402
from transformers.activations import ACT2FN  # noqa: E402
from transformers.trainer_callback import CallbackHandler  # noqa: E402

from sfexport.model.activations import ReleaseSReLU  # noqa: E402
from sfexport.model.projector import build_projector  # noqa: E402
from sfexport.model.srelu import SAMPLE_ROWS, SReLU, parameter_groups, srelu_modules  # noqa: E402

EXAMPLE = Path(__file__).parents[2] / "examples" / "srelu_digits" / "reproduce.py"
PARAMETERS = ("t_right", "a_right", "t_left", "a_left")
CHANNELS = 6


def make(values: dict[str, np.ndarray], dtype: torch.dtype = torch.float64) -> SReLU:
    """An SReLU with these parameters, each [channels]."""
    module = SReLU(len(values["t_right"])).to(dtype)
    module.load_state_dict({name: torch.from_numpy(value).to(dtype) for name, value in values.items()})
    return module


def random_values(channels: int = CHANNELS, crossed: bool = False, seed: int = 0) -> dict[str, np.ndarray]:
    """Float64 parameters with slopes of either sign. Crossed: every other channel has t_left > t_right."""
    rng = np.random.default_rng(seed)
    t_left, gap = rng.normal(size=channels), rng.uniform(0.5, 1.5, channels)
    t_right = t_left + np.where(crossed & (np.arange(channels) % 2 == 0), -gap, gap)
    slopes = {name: rng.normal(size=channels) for name in ("a_right", "a_left")}
    return {name: ({"t_right": t_right, "t_left": t_left} | slopes)[name] for name in PARAMETERS}


def inputs_around(values: dict[str, np.ndarray], rows: int = 40) -> np.ndarray:
    """Float64 [rows + 2, channels]; the last two rows lie exactly on the thresholds."""
    random = np.random.default_rng(1).normal(0, 2, (rows, len(values["t_right"])))
    return np.concatenate([random, values["t_right"][None], values["t_left"][None]])


def paper_value(x: float, t_right: float, a_right: float, t_left: float, a_left: float) -> float:
    """Equation 7; right before left."""
    if x >= t_right:
        return t_right + a_right * (x - t_right)
    return t_left + a_left * (x - t_left) if x <= t_left else x


def paper_gradients(x: float, t_right: float, a_right: float, t_left: float, a_left: float) -> tuple[float, ...]:
    """Equations 9 and 10: d h / d (x, t_right, a_right, t_left, a_left)."""
    if x >= t_right:
        return a_right, 1 - a_right, x - t_right, 0.0, 0.0
    return (a_left, 0.0, 0.0, 1 - a_left, x - t_left) if x <= t_left else (1.0, 0.0, 0.0, 0.0, 0.0)


def by_channel(function, x: np.ndarray, values: dict[str, np.ndarray]) -> np.ndarray:
    """function(x, t_right, a_right, t_left, a_left) of every element: [rows, channels, ...]."""
    parameters = list(zip(*(values[name] for name in PARAMETERS), strict=True))
    return np.array([[function(value, *p) for value, p in zip(row, parameters, strict=True)] for row in x])


# Values and gradients.


@pytest.mark.parametrize("crossed", [False, True])
def test_values_and_gradients_are_the_papers_also_on_the_thresholds(crossed: bool) -> None:
    values = random_values(crossed=crossed)
    x, module = inputs_around(values), make(values)
    weights = np.random.default_rng(2).normal(size=x.shape)
    given_x = torch.from_numpy(x).requires_grad_()
    (module(given_x) * torch.from_numpy(weights)).sum().backward()
    expected = by_channel(paper_gradients, x, values) * weights[..., None]
    np.testing.assert_allclose(module(given_x).detach(), by_channel(paper_value, x, values), rtol=0, atol=1e-12)
    np.testing.assert_allclose(given_x.grad, expected[..., 0], rtol=0, atol=1e-12)
    for i, name in enumerate(PARAMETERS, start=1):
        np.testing.assert_allclose(getattr(module, name).grad, expected[..., i].sum(0), rtol=0, atol=1e-10)


@pytest.mark.parametrize("crossed", [False, True])
@pytest.mark.parametrize("channels", [CHANNELS, None])
def test_gradcheck(channels: int | None, crossed: bool) -> None:
    values = random_values(channels or 1, crossed)
    module = make(values)
    x = torch.from_numpy(np.random.default_rng(3).normal(0, 2, (2, 5, CHANNELS)))
    for threshold in (module.t_right.detach(), module.t_left.detach()):  # finite differences must not meet a kink
        x = torch.where((x - threshold).abs() < 1e-2, x + 0.1, x)

    def apply(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, dict(zip(PARAMETERS, parameters, strict=True)), (x,))

    arguments = (x.requires_grad_(), *(torch.from_numpy(v).requires_grad_() for v in values.values()))
    assert torch.autograd.gradcheck(apply, arguments, eps=1e-6, atol=1e-6, rtol=0)


finite = st.floats(-100, 100, width=32)


@settings(max_examples=300, deadline=None)
@given(x=finite, t_left=finite, gap=st.floats(0, 100, width=32), a_right=finite, a_left=finite)
def test_values_are_a_sum_of_relus(x: float, t_left: float, gap: float, a_right: float, a_left: float) -> None:
    t_right = t_left + gap
    values = dict(zip(PARAMETERS, np.array([t_right, a_right, t_left, a_left])[:, None], strict=True))
    composed = x + (a_right - 1) * max(x - t_right, 0) - (a_left - 1) * max(t_left - x, 0)
    actual = make(values)(torch.tensor([x], dtype=torch.float64)).item()
    assert actual == pytest.approx(composed, rel=1e-12, abs=1e-10)


@settings(max_examples=300, deadline=None)
@given(x=finite, t_right=finite, t_left=finite, a_right=finite, a_left=finite)
def test_the_right_piece_wins_where_both_hold(x: float, **parameters: float) -> None:
    numbers = [parameters[name] for name in PARAMETERS]
    values = dict(zip(PARAMETERS, np.array(numbers)[:, None], strict=True))
    assert make(values)(torch.tensor([x], dtype=torch.float64)).item() == paper_value(x, *numbers)


@pytest.mark.parametrize("crossed", [False, True])
def test_float32_results_are_the_definitions_to_the_last_bit(crossed: bool) -> None:
    values = {name: value.astype(np.float32) for name, value in random_values(64, crossed).items()}
    x = torch.from_numpy(inputs_around(values, 500).astype(np.float32))
    module = make(values, torch.float32)
    t_right, a_right, t_left, a_left = module.own_parameters()
    left = torch.where(x <= t_left, t_left + a_left * (x - t_left), x)
    assert torch.equal(module(x), torch.where(x >= t_right, t_right + a_right * (x - t_right), left))


def test_infinity_and_nan_pass() -> None:
    module = SReLU(1)
    x = torch.tensor([[torch.inf], [-torch.inf], [torch.nan]])
    assert module(x)[:2].flatten().tolist() == [torch.inf, -torch.inf]
    assert module(x)[2].isnan().all()


@pytest.mark.parametrize("channels", [CHANNELS, None])
def test_it_starts_as_a_leaky_relu(channels: int | None) -> None:
    module = SReLU(channels)
    assert {n: tuple(p.shape) for n, p in module.named_parameters()} == dict.fromkeys(PARAMETERS, (channels or 1,))
    x = torch.randn(3, 7, CHANNELS)
    torch.testing.assert_close(module(x), torch.nn.functional.leaky_relu(x, 0.2))


def test_shared_channels_add_up_their_gradients() -> None:
    shared, apart = SReLU(), SReLU(CHANNELS)
    x = 3 * torch.randn(20, CHANNELS)
    for module in (shared, apart):
        module(x).square().sum().backward()
    for name in PARAMETERS:
        summed = getattr(apart, name).grad.sum(0, keepdim=True)
        torch.testing.assert_close(getattr(shared, name).grad, summed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains(dtype: torch.dtype) -> None:
    module, x = SReLU(CHANNELS).to(dtype), torch.randn(9, CHANNELS, dtype=dtype, requires_grad=True)
    module(x).sum().backward()
    assert module(x).dtype == x.grad.dtype == module.t_left.grad.dtype == dtype


def test_autocast_trains() -> None:
    module, linear = SReLU(CHANNELS), torch.nn.Linear(CHANNELS, CHANNELS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear(module(linear(torch.randn(9, CHANNELS)))).float().sum().backward()
    assert all(p.grad.isfinite().all() for p in (*module.parameters(), *linear.parameters()))


# Freezing and release.


def frozen(channels: int | None = None) -> SReLU:
    module = SReLU(channels)
    module.freeze()
    return module


def test_release_sets_the_quantile_of_what_was_seen() -> None:
    module = frozen(3)
    rows = torch.randperm(100)[:, None] + 1.0
    for part in (rows * torch.tensor([1.0, 2.0, 0.5])).split(30):
        module(part)
    module.release()
    assert module.t_right.tolist() == [90.0, 180.0, 45.0]  # the ceil(0.9 * 100)-th of 100 in ascending order
    assert all(p.requires_grad for p in module.parameters())


def test_the_quantile_can_be_chosen_and_is_checked() -> None:
    module = frozen()
    module(torch.arange(1.0, 101.0))
    for wrong in (0, -0.5, 1.01):
        with pytest.raises(ValueError, match="quantile"):
            module.release(wrong)
    assert module.frozen
    module.release(0.1)
    assert module.t_right.item() == 10


def test_the_sample_is_bounded_and_recent_and_leaves_random_numbers_alone() -> None:
    module, state = frozen(2), torch.random.get_rng_state()
    module(torch.full((SAMPLE_ROWS, 2), 1000.0))
    for seed in range(10):
        module(torch.randn(5000, 2, generator=torch.Generator().manual_seed(seed)))
    assert module._sample.shape == (SAMPLE_ROWS, 2)
    assert torch.equal(torch.random.get_rng_state(), state)
    module.release()
    torch.testing.assert_close(module.t_right.detach(), torch.full((2,), 1.2816), atol=0.1, rtol=0)
    assert module._sample is None


def test_only_training_passes_are_observed_and_nothing_is_saved() -> None:
    module = frozen(2)
    module.eval()(torch.full((5, 2), 7.0))
    assert module._sample is None
    module.train()(torch.full((5, 2), 3.0))
    assert set(module.state_dict()) == set(PARAMETERS)
    assert copy.deepcopy(module)._seen == 5
    module.release()
    assert module.t_right.tolist() == [3.0, 3.0]


@pytest.mark.parametrize("seen", [-5.0, 0.0, float("nan"), float("inf")])
def test_a_quantile_that_is_no_threshold_leaves_it(seen: float) -> None:
    module = frozen(2)
    module(torch.tensor([[seen, 4.0]] * 3))
    module.release()
    assert module.t_right.tolist() == [1.0, 4.0]


def test_release_without_observations_and_freezing_again() -> None:
    module = frozen(2)
    module.release()
    assert module.t_right.tolist() == [1.0, 1.0]
    assert not module.frozen
    module(torch.full((5, 2), 9.0))
    module.freeze()
    module(torch.full((5, 2), 3.0))
    module.release()
    assert module.t_right.tolist() == [3.0, 3.0]


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(32, 4)).square().mean().backward()
    optimizer.step()


def small_network() -> torch.nn.Sequential:
    nn = torch.nn
    return nn.Sequential(nn.Linear(4, 8), SReLU(8), nn.LayerNorm(8), nn.Linear(8, 8), SReLU(), nn.Linear(8, 2))


def test_frozen_parameters_stay_and_train_after_release() -> None:
    torch.manual_seed(0)
    model = small_network()
    for module in srelu_modules(model):
        module.freeze()
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=0.1)
    before = [p.clone() for module in srelu_modules(model) for p in module.own_parameters()]
    step(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, own(model), strict=True))
    for module in srelu_modules(model):
        module.release()
    before = [p.clone() for p in own(model)]
    step(model, optimizer)
    step(model, optimizer)  # t_right's gradient is 0 as long as a_right is 1
    assert all(not torch.equal(a, b) for a, b in zip(before, own(model), strict=True))


def own(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach() for module in srelu_modules(model) for p in module.own_parameters()]


def test_weight_decay_is_for_matrices_only() -> None:
    model = small_network()
    model[0].requires_grad_(False)
    decayed, plain = parameter_groups(model, weight_decay=0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for p in decayed["params"]] == ["3.weight", "5.weight"]
    srelu = {f"{i}.{name}" for i in (1, 4) for name in PARAMETERS}
    assert {names[id(p)] for p in plain["params"]} == srelu | {"2.weight", "2.bias", "3.bias", "5.bias"}
    assert len(plain["params"]) == len(srelu) + 4


# In transformers.


def test_transformers_knows_srelu_by_name() -> None:
    module = ACT2FN["srelu"]
    assert isinstance(module, SReLU)
    assert module.t_right.shape == (1,)
    assert ACT2FN["srelu"] is not module


def handler(model: torch.nn.Module, callback: ReleaseSReLU, output: Path) -> tuple:
    """What a Trainer does with its callbacks: the handler, and the arguments of each event."""
    events = CallbackHandler([callback], model, None, None, None)
    return events, (TrainingArguments(output_dir=str(output), use_cpu=True), TrainerState(), TrainerControl())


def test_the_callback_freezes_and_releases_at_its_step(tmp_path: Path) -> None:
    model = small_network()
    events, (args, state, control) = handler(model, ReleaseSReLU(2, quantile=0.5), tmp_path)
    events.on_train_begin(args, state, control)
    for global_step in (1, 2, 3):
        assert [m.frozen for m in srelu_modules(model)] == [global_step <= 2] * 2
        model(torch.full((3, 4), 2.0) + torch.randn(3, 4))
        state.global_step = global_step
        events.on_step_end(args, state, control)
    assert model[1].t_right.tolist() != [1.0] * 8


@pytest.mark.parametrize(("release_at", "resumed_at"), [(0, 0), (5, 5), (5, 9)])
def test_the_callback_does_not_freeze_after_its_step(release_at: int, resumed_at: int, tmp_path: Path) -> None:
    model = small_network()
    events, (args, state, control) = handler(model, ReleaseSReLU(release_at), tmp_path)
    state.global_step = resumed_at
    events.on_train_begin(args, state, control)
    assert not any(m.frozen for m in srelu_modules(model))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two SReLUs; read only."""
    path = tmp_path_factory.mktemp("srelu") / "checkpoint"
    write_random_checkpoint(path, changes={"mm_projector_type": "mlp3x_srelu"})
    return path


NAMES = [f"model.mm_projector.{i}.{name}" for i in (1, 3) for name in PARAMETERS]


def test_the_checkpoints_parameters_are_loaded(checkpoint: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    stored, state = Checkpoint.open(checkpoint), model.state_dict()
    assert [name for name in state if "mm_projector.1." in name or "mm_projector.3." in name] == NAMES
    for name in NAMES:
        np.testing.assert_array_equal(state[name], stored.tensors[name].rows())
    assert (state[NAMES[0]] > state[NAMES[2]]).all()


@pytest.mark.parametrize("start", ["nothing", "a GELU checkpoint"])
def test_what_is_not_loaded_starts_as_a_leaky_relu(start: str, tree: Tree, checkpoint: Path) -> None:
    if start == "nothing":
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint))
    else:  # transformers builds on the meta device and initialises what is missing
        config = AutoConfig.from_pretrained(tree.checkpoint)
        config.mm_projector_type = "mlp2x_srelu"
        model = AutoModelForCausalLM.from_pretrained(tree.checkpoint, config=config)
    for module in srelu_modules(model):
        assert [p.unique().tolist() for p in module.own_parameters()] == [
            [1.0],
            [1.0],
            [0.0],
            [pytest.approx(0.2, 1e-2)],
        ]
    assert len(srelu_modules(model)) == (2 if start == "nothing" else 1)


def test_saved_and_loaded_again(checkpoint: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        srelu_modules(model)[0].t_left.fill_(-3)
    model.save_pretrained(tmp_path)
    Checkpoint.open(tmp_path).validate()
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(own(model), own(again), strict=True))


# Checkpoints and what is wrong with them.


@pytest.mark.parametrize(("kind", "srelus"), [("mlp1x_srelu", []), ("mlp2x_srelu", [1]), ("mlp3x_srelu", [1, 3])])
def test_expected_tensors(kind: str, srelus: list[int], checkpoint: Path) -> None:
    raw = Checkpoint.open(checkpoint).raw_config | {"mm_projector_type": kind}
    config = ModelConfig.from_dict(raw)
    assert config.projector.activation == "srelu"
    expected = {name: shape for name, shape in config.expected_tensors().items() if "mm_projector" in name}
    gelu = ModelConfig.from_dict(raw | {"mm_projector_type": kind.replace("srelu", "gelu")}).expected_tensors()
    added = {f"model.mm_projector.{i}.{name}": (64,) for i in srelus for name in PARAMETERS}
    assert expected == {name: shape for name, shape in gelu.items() if "mm_projector" in name} | added


def copy_of(checkpoint: Path, folder: Path) -> Path:
    (folder / "checkpoint").mkdir()
    for file in checkpoint.iterdir():
        (folder / "checkpoint" / file.name).write_bytes(file.read_bytes())
    return folder / "checkpoint"


def assert_refused(checkpoint: Path, folder: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError):
        Checkpoint.open(checkpoint).validate()
    assert_says(refusal(folder, "export", checkpoint, "-o", folder / "bundle"), *parts)
    assert_says(refusal(folder, "inspect", checkpoint), *parts)


def test_missing_parameters_are_named(checkpoint: Path, tmp_path: Path) -> None:
    damaged = copy_of(checkpoint, tmp_path)
    shards = [damaged / name for name in (FIRST, SECOND)]
    for name in (NAMES[0], NAMES[6]):
        (shard,) = [s for s in shards if name in split_shard(s)[0]]
        change_tensors(shard, lambda tensors, name=name: tensors.pop(name))
    assert_refused(damaged, tmp_path, f"lacks {NAMES[0]}, {NAMES[6]}")


def test_a_gelu_checkpoint_called_srelu_lacks_its_parameters(tree: Tree, tmp_path: Path) -> None:
    damaged = copy_of(tree.checkpoint, tmp_path)
    set_fields(damaged / "config.json", mm_projector_type="mlp2x_srelu")
    assert_refused(damaged, tmp_path, "lacks model.mm_projector.1.t_right", "and 1 more")


@pytest.mark.parametrize("name", [NAMES[0], NAMES[3], NAMES[6]])
@pytest.mark.parametrize("bits", [0x7FC0, 0x7F80, 0xFF80], ids=["nan", "inf", "-inf"])
def test_parameters_must_be_finite(bits: int, name: str, checkpoint: Path, tmp_path: Path) -> None:
    damaged = copy_of(checkpoint, tmp_path)
    place = Checkpoint.open(damaged).tensors[name]
    with place.shard.open("r+b") as file:
        file.seek(place.offset + 2 * 17)
        file.write(bits.to_bytes(2, "little"))
    assert_refused(damaged, tmp_path, name, "not finite")


@pytest.mark.parametrize("kind", ["mlp2x_relu", "srelu", "mlp2x_srelu2", "mlpx_srelu", "mlp2x_SReLU"])
def test_an_unknown_projector_is_refused(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    damaged = copy_of(checkpoint, tmp_path)
    set_fields(damaged / "config.json", mm_projector_type=kind)
    assert_refused(damaged, tmp_path, repr(kind), "mlp<N>x_gelu, mlp<N>x_srelu")


# The exported graph.


class Stored:
    """Tensors in memory in the place of a checkpoint's."""

    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        self._tensors = tensors

    def tensor(self, name: str, rows: tuple[int, int] | None = None) -> ir.Tensor:
        assert rows is None
        return ir.tensor(self._tensors[name], name=name)

    def packed(self, name: str, rows: tuple[int, int] | None = None) -> None:
        """Nothing here is quantised."""


def run_graph(tensors: dict[str, np.ndarray], x: np.ndarray, write) -> np.ndarray:
    """write(graph, value) in ONNX Runtime, in x's own type."""
    dtype = {np.dtype(np.float32): ir.DataType.FLOAT, np.dtype(np.float16): ir.DataType.FLOAT16}[x.dtype]
    g = GraphWriter("g", Stored(tensors), dtype)
    out = write(g, g.input("x", dtype, ["rows", x.shape[1]]))
    g.output("y", out, dtype, ["rows", None])
    raw = ir.to_proto(g.model()).SerializeToString()
    session = onnxruntime.InferenceSession(raw, providers=["CPUExecutionProvider"])
    assert {n.op_type for n in g.model().graph} <= {"Gemm", "Sub", "Mul", "Add", "Where", "Cast"} | {
        "GreaterOrEqual",
        "LessOrEqual",
    }
    return session.run(["y"], {"x": x})[0]


@pytest.mark.parametrize("crossed", [False, True])
def test_the_graph_computes_what_torch_does(crossed: bool) -> None:
    values = {name: value.astype(np.float32) for name, value in random_values(64, crossed).items()}
    x = inputs_around(values, 300).astype(np.float32)
    y = run_graph({f"s.{name}": value for name, value in values.items()}, x, lambda g, v: g.srelu(v, "s"))
    expected = make(values, torch.float32)(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(y[-2:], expected[-2:])


def test_a_half_precision_graph_computes_it_in_float32() -> None:
    values = {name: value.astype(np.float16) for name, value in random_values(64).items()}
    x = inputs_around(values, 300).astype(np.float16)
    y = run_graph({f"s.{name}": value for name, value in values.items()}, x, lambda g, v: g.srelu(v, "s"))
    expected = make(values, torch.float32)(torch.from_numpy(x).float()).detach().half().numpy()
    np.testing.assert_array_equal(y, expected, strict=True)


def test_a_projector_fed_exactly_its_thresholds_agrees() -> None:
    values = {name: value.astype(np.float32) for name, value in random_values(8, crossed=True).items()}
    config = ProjectorConfig("mlp", 3, 8, "srelu")
    projector = build_projector(config, 8)
    with torch.no_grad():
        projector[0].weight.copy_(torch.eye(8))
        projector[0].bias.zero_()
        projector[1].load_state_dict({name: torch.from_numpy(value) for name, value in values.items()})
        projector[3].t_right.fill_(0.3)
        projector[3].a_right.fill_(-0.5)
    x = inputs_around(values, 20).astype(np.float32)
    tensors = {f"model.mm_projector.{name}": value.numpy() for name, value in projector.state_dict().items()}
    y = run_graph(tensors, x, lambda g, v: write_projector(g, config, v))
    np.testing.assert_allclose(y, projector(torch.from_numpy(x)).detach(), rtol=0, atol=1e-6)


# The example.


def test_the_digits_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process: its libraries take longer to load than it takes."""
    pytest.importorskip("sklearn")
    tiny = [str(EXAMPLE), "--seeds", "2", "--epochs", "2"]
    printed = []
    for arguments in ([*tiny, "--json"], tiny):
        monkeypatch.setattr(sys, "argv", arguments)
        runpy.run_path(str(EXAMPLE), run_name="__main__")
        printed.append(capsys.readouterr().out)
    errors = strict_json(printed[0])["test_error_percent"]
    assert [len(values) for values in errors.values()] == [2] * 5
    assert all(0 <= value <= 100 for values in errors.values() for value in values)
    assert [line.split("|")[1].strip() for line in printed[1].splitlines()[2:]] == list(errors)
