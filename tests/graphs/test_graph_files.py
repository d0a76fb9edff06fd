"""The exported files themselves: what other tools see when they open them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from sfexport.artifacts.bundle import GRAPHS, Bundle
from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.checkpoint.fast_path import cell_weights, fast_token_count, frame_weights
from sfexport.exporting.export import ExportOptions, export
from sfexport.graphs.names import new_names, past_names, prefix_names
from sfexport.testing.random_checkpoint import write_random_checkpoint

HYBRID = (0, 2)


@pytest.fixture(scope="module")
def bundle(tree) -> Bundle:
    return Bundle.open(tree.bundle)


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_pass_the_full_check_by_path(name: str, bundle: Bundle) -> None:
    onnx.checker.check_model(str(bundle.graph_file(name)), full_check=True)


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_open_in_onnxruntime_by_path(name: str, bundle: Bundle) -> None:
    session = onnxruntime.InferenceSession(str(bundle.graph_file(name)), providers=["CPUExecutionProvider"])
    assert session.get_inputs()


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_use_opset_18_and_plain_operators(name: str, bundle: Bundle) -> None:
    model = onnx.load(bundle.graph_file(name), load_external_data=False)
    assert {o.domain: o.version for o in model.opset_import}[""] == 18
    foreign = [n.op_type for n in model.graph.node if n.domain not in ("", "ai.onnx")]
    assert foreign == (["CrossAttention"] * len(HYBRID) if name == "decoder" else [])


def test_cross_attention_is_one_node_with_a_body_and_plugin_attributes(bundle: Bundle) -> None:
    model = onnx.load(bundle.graph_file("decoder"), load_external_data=False)
    nodes = [n for n in model.graph.node if n.op_type == "CrossAttention"]
    for node in nodes:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert node.domain == "sfexport"
        assert attributes == {"plugin_namespace": b"sfexport", "plugin_version": b"1"}
    (function,) = model.functions
    assert (function.domain, function.name) == ("sfexport", "CrossAttention")
    assert list(function.input) == ["query", "key", "value", "attends", "lengths"]


@pytest.mark.parametrize("name", GRAPHS)
def test_weights_are_external_and_point_into_the_shards(name: str, bundle: Bundle) -> None:
    checkpoint = Checkpoint.open(bundle.path)
    model = onnx.load(bundle.graph_file(name), load_external_data=False)
    external = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert external
    for tensor in external:
        entries = {e.key: e.value for e in tensor.external_data}
        assert set(entries) == {"location", "offset", "length"}, "TensorRT's parser refuses other keys"
        place = checkpoint.tensors[tensor.name]
        assert entries["location"] == place.shard.name
        assert (int(entries["offset"]), int(entries["length"])) == (place.offset, place.length)
    internal = [t for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    assert sum(len(t.raw_data) for t in internal) < 4096, "only small constants are stored in the file"


def test_every_needed_tensor_is_in_exactly_the_right_graph(bundle: Bundle) -> None:
    """All tensors are used; only the layers' input norms of hybrid layers are used twice."""
    used: dict[str, list[str]] = {}
    for name in GRAPHS:
        model = onnx.load(bundle.graph_file(name), load_external_data=False)
        for tensor in model.graph.initializer:
            used.setdefault(tensor.name, []).append(name)
    expected = set(Checkpoint.open(bundle.path).expected_tensors()) - {"model.embed_tokens.weight"}
    assert expected <= set(used)
    twice = {name for name in expected if len(used[name]) > 1}
    assert twice == {f"model.layers.{i}.input_layernorm.weight" for i in HYBRID}


def test_exporting_twice_gives_the_same_bytes(tree, tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        made = export(Checkpoint.open(tree.checkpoint), tmp_path / name, ExportOptions(weights="copy"))
        files.append([made.graph_file(g).read_bytes() for g in GRAPHS])
    assert files[0] == files[1]


def test_export_imports_neither_torch_nor_onnxruntime(tree, tmp_path: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.exporting.export import ExportOptions, export
export(Checkpoint.open({str(tree.checkpoint)!r}), Path({str(tmp_path / "b")!r}), ExportOptions())
print([m for m in ("torch", "transformers", "onnxruntime") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class Decoder:
    """The decoder graph with random inputs of chosen sizes."""

    def __init__(self, bundle: Bundle) -> None:
        self.text = bundle.config.text
        path = str(bundle.graph_file("decoder"))
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.prefix_names, self.past_names = prefix_names(bundle.config), past_names(bundle.config)

    def feeds(
        self, batch: int, sequence: int, past: int, slow: int, prefix: int = 0, videos: int | None = None
    ) -> dict[str, np.ndarray]:
        random, text = np.random.default_rng(0), self.text

        def values(*shape: int) -> np.ndarray:
            return random.normal(size=shape).astype(np.float32)

        names = [i.name for i in self.session.get_inputs() if i.name.startswith("slow_key_values")]
        return {
            "inputs_embeds": values(batch, sequence, text.hidden_size),
            "position_ids": np.tile(np.arange(prefix + past, prefix + past + sequence), (batch, 1)),
            "attention_mask": np.ones((batch, sequence), dtype=bool),
            "slow_attends": np.ones((batch, sequence), dtype=bool),
            "slow_lengths": np.full(videos or batch, slow),
            "past_lengths": np.full(batch, past),
            **{name: values(1, text.num_kv_heads, prefix, text.head_dim) for name in self.prefix_names},
            **{name: values(batch, text.num_kv_heads, past, text.head_dim) for name in self.past_names},
            **{name: values(videos or batch, text.num_kv_heads, slow, text.head_dim) for name in names},
        }

    def __call__(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        return self.session.run(["logits"], feeds)[0]


@pytest.fixture(scope="module")
def decoder(bundle: Bundle) -> Decoder:
    return Decoder(bundle)


@pytest.mark.parametrize(
    "sizes", [(2, 3, 5, 7), (1, 6, 0, 9), (1, 1, 6, 9), (3, 1, 11, 20), (1, 4, 0, 0), (2, 1, 3, 0)]
)
def test_all_lengths_are_dynamic(sizes: tuple[int, ...], decoder: Decoder) -> None:
    logits = decoder(decoder.feeds(*sizes))
    assert logits.shape == (sizes[0], decoder.text.vocab_size)
    assert np.isfinite(logits).all()


def test_the_slice_of_the_last_position_is_what_a_gather_gave(bundle: Bundle, decoder: Decoder) -> None:
    """Gather(axis=1, index=-1), which ONNX defines and TensorRT does not."""
    model = onnx.load(bundle.graph_file("decoder"))
    nodes = {node.output[0]: node for node in model.graph.node}
    (squeeze,) = [n for n in nodes.values() if n.op_type == "Squeeze" and nodes[n.input[0]].op_type == "Slice"]
    cut = nodes[squeeze.input[0]]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(-1), "last"))
    gather = onnx.helper.make_node("Gather", [cut.input[0], "last"], list(squeeze.output), axis=1)
    model.graph.node.insert(list(model.graph.node).index(cut), gather)
    model.graph.node.remove(cut)
    model.graph.node.remove(squeeze)
    gathered = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for sizes in ((2, 3, 5, 7), (1, 6, 0, 9), (3, 1, 11, 20)):
        feeds = decoder.feeds(*sizes)
        np.testing.assert_array_equal(decoder(feeds), gathered.run(["logits"], feeds)[0])


def test_rows_of_a_batch_do_not_touch_each_other(decoder: Decoder) -> None:
    feeds = decoder.feeds(3, 4, 5, 7)
    feeds["slow_lengths"] = np.array([7, 3, 0])
    feeds["past_lengths"] = np.array([5, 2, 0])
    feeds["attention_mask"][1, :2] = False
    together = decoder(feeds)
    for row in range(3):
        own = {name: value if name in decoder.prefix_names else value[row : row + 1] for name, value in feeds.items()}
        np.testing.assert_allclose(together[row], decoder(own)[0], atol=1e-5)


def test_what_rows_share_is_as_if_each_had_its_own(decoder: Decoder) -> None:
    """A prefix and slow tokens of one row, against copies: the prefix's as each row's past."""
    feeds = decoder.feeds(3, 2, 0, 7, prefix=5, videos=1)
    copies = dict(feeds, slow_lengths=np.full(3, 7), past_lengths=np.full(3, 5))
    for name, value in feeds.items():
        if name.startswith("slow_key_values"):
            copies[name] = np.repeat(value, 3, axis=0)
    for prefix, past in zip(decoder.prefix_names, decoder.past_names, strict=True):
        copies[past] = np.repeat(feeds[prefix], 3, axis=0)
        copies[prefix] = feeds[prefix][:, :, :0]
    np.testing.assert_allclose(decoder(feeds), decoder(copies), atol=1e-5)


def test_what_lies_behind_the_valid_past_changes_nothing(decoder: Decoder) -> None:
    feeds = decoder.feeds(2, 3, 4, 5, prefix=6)
    expected = decoder(feeds)
    for name in decoder.past_names:
        feeds[name] = np.pad(feeds[name], ((0, 0), (0, 0), (0, 3), (0, 0)), constant_values=100)
    np.testing.assert_allclose(decoder(feeds), expected, atol=1e-5)


def test_only_the_new_key_values_are_outputs(bundle: Bundle, decoder: Decoder) -> None:
    outputs = {o.name: o.shape for o in decoder.session.get_outputs()}
    assert list(outputs)[1:] == new_names(bundle.config)
    text = decoder.text
    assert {tuple(s) for s in list(outputs.values())[1:]} == {("batch", text.num_kv_heads, "sequence", text.head_dim)}


def test_a_padded_slow_token_changes_nothing(decoder: Decoder) -> None:
    feeds = decoder.feeds(1, 4, 2, 5)
    expected = decoder(feeds)
    for name in list(feeds):
        if name.startswith("slow_key_values"):
            feeds[name] = np.pad(feeds[name], ((0, 0), (0, 0), (0, 4), (0, 0)), constant_values=100)
    np.testing.assert_allclose(decoder(feeds), expected, atol=1e-5)


def test_attending_nowhere_is_the_same_as_having_no_slow_token(decoder: Decoder) -> None:
    feeds = decoder.feeds(1, 4, 2, 5)
    attending = decoder(feeds)
    none = decoder(feeds | {"slow_lengths": np.array([0])})
    nowhere = decoder(feeds | {"slow_attends": np.zeros((1, 4), dtype=bool)})
    np.testing.assert_array_equal(none, nowhere)
    assert np.abs(attending - none).max() > 1e-3


def test_a_fully_masked_row_gives_finite_numbers(decoder: Decoder) -> None:
    feeds = decoder.feeds(2, 4, 0, 5)
    feeds["attention_mask"][0] = False
    assert np.isfinite(decoder(feeds)).all()


@pytest.mark.parametrize("frames", [1, 2, 5, 16, 33])
@pytest.mark.parametrize("spatial", [1, 2])
def test_fast_token_count_agrees_with_the_matrices(frames: int, spatial: int, bundle: Bundle) -> None:
    from dataclasses import replace

    fast, cells = replace(bundle.config.slow_fast.fast, spatial_stride=spatial), 16
    rows = len(frame_weights(frames, fast)) * (len(cell_weights(cells, spatial)) if spatial > 1 else cells)
    assert fast_token_count(frames, cells, fast) == rows


def test_cell_weights_are_means_of_square_windows() -> None:
    grid = np.arange(25, dtype=np.float32)
    pooled = cell_weights(25, 2) @ grid
    expected = grid.reshape(5, 5)[:4, :4].reshape(2, 2, 2, 2).mean((1, 3)).ravel()
    np.testing.assert_allclose(pooled, expected)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_weights_of_every_stored_type_give_the_same_logits(dtype: str, decoder: Decoder, tmp_path: Path) -> None:
    """The demo's weights are bfloat16; rewritten as float32 they are the same numbers, as float16 nearly."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    write_random_checkpoint(tmp_path / "c")
    kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    for shard in (tmp_path / "c").glob("*.safetensors"):
        save_file({name: value.to(kind) for name, value in load_file(shard).items()}, shard)
    made = export(Checkpoint.open(tmp_path / "c"), tmp_path / "b", ExportOptions(weights="copy"))
    feeds = decoder.feeds(1, 4, 2, 5)
    atol = 2e-3 if dtype == "F16" else 1e-6
    np.testing.assert_allclose(Decoder(made)(feeds), decoder(feeds), atol=atol)
