"""The PyTorch model and the ONNX graphs against tensors recorded from the reference, within 1e-4.

Set SFEXPORT_GOLDEN to a folder of golden directories to try others.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from golden_data import ROOT, Golden, directories, goldens
from sessions import model_session
from text_cache import TextCache

from sfexport.artifacts.bundle import Bundle
from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.checkpoint.config import FastPathConfig
from sfexport.checkpoint.fast_path import cell_weights, frame_weights, source_frames
from sfexport.engines.embedding import EmbeddingTable
from sfexport.exporting.export import ExportOptions, export
from sfexport.graphs.names import hidden_name, slow_names

ATOL = 1e-4
STEPS = 8
VIDEO, TEXT, VISUAL = -200, 2, 3
each_golden = pytest.mark.parametrize("golden", goldens(), ids=lambda g: g.name)
# Right padding breaks decoding upstream, so that such a batch is recorded without.
each_decoded = pytest.mark.parametrize(
    "golden", [g for g in goldens() if "greedy_ids" in g.outputs], ids=lambda g: g.name
)


def test_golden_directories_are_there() -> None:
    assert directories(), f"no golden directory in {ROOT}"


def assert_close(what: str, found: np.ndarray, golden: np.ndarray, where: np.ndarray | None = None) -> None:
    assert found.shape == golden.shape, f"{what}: shape {found.shape}, golden {golden.shape}"
    difference = np.abs(found.astype(np.float64) - golden)
    difference = difference if where is None else difference[where]
    assert difference.size, f"{what}: nothing to compare"
    assert difference.max() <= ATOL, f"{what}: max |difference| {difference.max():.2e}"


# --- the PyTorch model -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def load_model() -> Callable:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    import sfexport.model  # noqa: F401  registers the Auto classes

    models: dict[Path, object] = {}

    def load(path: Path):
        if path not in models:
            model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
            assert not any(info.values()), info
            models[path] = model.eval()
        return models[path]

    return load


def tensors(golden: Golden) -> dict:
    """The golden's inputs as the model's arguments."""
    import torch

    out = {
        key: torch.from_numpy(golden.inputs[key]) if key in golden.inputs else None
        for key in ("input_ids", "attention_mask", "labels")
    }
    out["images"] = [torch.from_numpy(golden.pixels(b)) for b in range(golden.rows)]
    return out


@each_golden
def test_torch_vision_and_merging(golden: Golden, load_model: Callable) -> None:
    import torch

    model, want, args = load_model(golden.path), golden.outputs, tensors(golden)
    with torch.no_grad():
        features = model.model.vision_tower(torch.cat(args["images"]))
        assert_close("vision_features", features.numpy(), want["vision_features"])
        assert_close("projected", model.model.mm_projector(features).numpy(), want["projected_features"])
        videos = model.model.encode_videos(args["images"])
        for b in range(golden.rows):
            assert_close(f"slow {b}", videos.slow[b].numpy(), want[f"slow_tokens_{b}"])
            assert_close(f"fast {b}", videos.fast[b].numpy(), want[f"fast_tokens_{b}"])
        assert np.array_equal(videos.padded_slow()[1].numpy(), want["cross_attn_mask"])
        merged, _ = model.prepare_multimodal(**args)
    assert np.array_equal(merged.token_types.numpy(), want["token_types"])
    assert np.array_equal(merged.position_ids.numpy()[golden.valid], want["position_ids"][golden.valid])
    assert_close("inputs_embeds", merged.inputs_embeds.numpy(), want["inputs_embeds"], golden.valid)
    if "attention_mask" in want:
        assert np.array_equal(merged.attention_mask.numpy(), want["attention_mask"].astype(bool))
    if "labels_merged" in want:
        assert np.array_equal(merged.labels.numpy(), want["labels_merged"])


@each_golden
def test_torch_prefill(golden: Golden, load_model: Callable) -> None:
    import torch

    model, want, args = load_model(golden.path), golden.outputs, tensors(golden)
    seen: dict[str, torch.Tensor] = {}
    handles = [model.model.layers[-1].register_forward_hook(lambda m, a, out: seen.update(last=out))]
    hybrid = model.config.model_config.slow_fast.hybrid_layers
    if hybrid and "hybrid_attn_out" in want:
        attention = model.model.layers[hybrid[0]].self_attn
        gate, o_proj = attention.cross_attn_gate_proj, attention.o_proj
        handles.append(gate.register_forward_pre_hook(lambda m, a: seen.update(self_attn=a[0])))
        handles.append(o_proj.register_forward_pre_hook(lambda m, a: seen.update(attn_out=a[0])))
    with torch.no_grad():
        out = model(**args, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    valid = golden.valid
    assert_close("logits", out.logits.numpy(), want["prefill_logits"], valid)
    for i, hidden in enumerate(out.hidden_states):
        assert_close(f"hidden_states {i}", hidden.numpy(), want["hidden_states"][i], valid)
    assert_close("last layer", seen["last"].numpy(), want["last_layer_output"], valid)
    if "attn_out" in seen:
        assert_close("hybrid_self_attn", seen["self_attn"].numpy(), want["hybrid_self_attn"], valid)
        assert_close("hybrid_attn_out", seen["attn_out"].numpy(), want["hybrid_attn_out"], valid)
    if "loss" in want:
        assert abs(out.loss.item() - float(want["loss"])) <= ATOL


@each_golden
def test_torch_without_gates(golden: Golden, load_model: Callable) -> None:
    """The golden's ablation: every gate zero. Shows that the comparison above can fail."""
    import torch

    model, want, args = load_model(golden.path), golden.outputs, tensors(golden)
    gates = [p for name, p in model.named_parameters() if "cross_attn_gate_proj" in name]
    kept = [p.detach().clone() for p in gates]
    try:
        with torch.no_grad():
            for gate in gates:
                gate.zero_()
            logits = model(**args).logits.numpy()
    finally:
        with torch.no_grad():
            for gate, values in zip(gates, kept, strict=True):
                gate.copy_(values)
    # The golden takes the row's last column, which is padding where rows are padded on the right.
    last = golden.valid[:, -1]
    if "gate0_prefill_logits_last" in want and last.any():
        assert_close("gates off", logits[last, -1], want["gate0_prefill_logits_last"][last])


@each_decoded
@pytest.mark.parametrize("mode", ["released", "trained"])
def test_torch_decode(golden: Golden, mode: str, load_model: Callable) -> None:
    want = golden.outputs
    prefix = "" if mode == "released" else "xattn_"
    model, args = load_model(golden.path), tensors(golden)
    out = model.generate(
        args["input_ids"],
        images=args["images"],
        attention_mask=args["attention_mask"],
        decode_mode=mode,
        max_new_tokens=STEPS + 1,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert np.array_equal(out.sequences.numpy(), want[f"{prefix}greedy_ids"])
    logits = np.stack([step.numpy() for step in out.logits[1:]], axis=1)
    assert_close("decode logits", logits, want[f"{prefix}decode_logits"])


# --- the ONNX graphs ---------------------------------------------------------------------------------------


class Graphs:
    """A golden checkpoint's three graphs in ONNX Runtime, with inner values as further outputs."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.config = bundle, bundle.config
        self.embed = EmbeddingTable(bundle.embedding())
        layers = self.config.text.num_layers
        inner = [hidden_name(i) for i in range(layers)]
        for i in self.config.slow_fast.hybrid_layers:
            inner += [f"hybrid_self_attn.{i}", f"hybrid_attn_out.{i}"]
        self.vision = self._session("vision_encoder", ["vision_features"])
        self.compressor = self._session("compressor", [])
        self.decoder = self._session("decoder", inner)

    def _session(self, name: str, inner: list[str]) -> onnxruntime.InferenceSession:
        model = onnx.load(self.bundle.graph_file(name), load_external_data=False)
        for value in inner:
            model.graph.output.append(onnx.helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, None))
        return model_session(model, self.bundle.weights_directory)

    @staticmethod
    def run(session: onnxruntime.InferenceSession, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = [o.name for o in session.get_outputs()]
        return dict(zip(names, session.run(names, feeds), strict=True))

    def encode(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        return self.run(self.vision, {"pixel_values": pixels})

    def compress(self, slow: np.ndarray) -> dict[str, np.ndarray]:
        fast = self.config.slow_fast.fast
        feeds = {"slow_tokens": slow, "frame_weights": frame_weights(len(slow), fast)}
        if fast.spatial_stride > 1:
            feeds["cell_weights"] = cell_weights(slow.shape[1], fast.spatial_stride)
        return self.run(self.compressor, feeds)

    def decode(self, feeds: dict[str, np.ndarray], cache: TextCache) -> dict[str, np.ndarray]:
        """Outputs; the new K/V of positions that are no padding go into the cache."""
        out = self.run(self.decoder, feeds | cache.feeds())
        cache.append(out, feeds["attention_mask"])
        return out


@pytest.fixture(scope="module")
def load_graphs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Golden], Graphs]:
    loaded: dict[Path, Graphs] = {}

    def load(golden: Golden) -> Graphs:
        if golden.path not in loaded:
            folder = tmp_path_factory.mktemp("golden")
            checkpoint = Path(shutil.copytree(golden.path, folder / "checkpoint"))
            # Goldens are recorded at sizes of their own and have no preprocessor file.
            size = golden.pixels(0).shape[-1]
            (checkpoint / "preprocessor_config.json").write_text(json.dumps({"size": size}))
            bundle = export(Checkpoint.open(checkpoint), folder / "bundle", ExportOptions(weights="reference"))
            loaded[golden.path] = Graphs(bundle)
        return loaded[golden.path]

    return load


class Batch:
    """A golden's batch, made from the graphs' own outputs, ready for the decoder."""

    def __init__(self, golden: Golden, graphs: Graphs) -> None:
        self.golden, self.graphs, self.config = golden, graphs, graphs.config
        self.compressed = [self._compress(b) for b in range(golden.rows)]
        rows = [self._merge(b) for b in range(golden.rows)]
        types = golden.outputs["token_types"]
        self.embeds = np.zeros((*types.shape, self.config.text.hidden_size), np.float32)
        self.embeds[golden.valid] = np.concatenate(rows)
        self.positions = np.where(golden.valid, np.cumsum(golden.valid, axis=1) - 1, 0)
        self.slow = self._slow()
        visual = types == VISUAL
        self.attends = self._attends(types, visual)
        lengths = [len(golden.outputs[f"slow_tokens_{b}"]) for b in range(golden.rows)]
        self.slow_lengths = np.where(visual.any(1), lengths, 0).astype(np.int64)

    def _compress(self, b: int) -> dict[str, np.ndarray]:
        pixels = self.golden.pixels(b)
        encoded = self.graphs.encode(pixels)
        slow = encoded["projected_features" if len(pixels) == 1 else "slow_tokens"]
        return encoded | {"slow": slow} | self.graphs.compress(slow)

    def _merge(self, b: int) -> np.ndarray:
        ids, embed = self.golden.ids(b), self.graphs.embed
        at = np.flatnonzero(ids == VIDEO)
        if len(at):
            before, after = ids[: at[0]], ids[at[0] + 1 :]
            fast = self.compressed[b]["fast_tokens"]
            merged = np.concatenate([embed(before), fast, embed(after)])
        else:
            merged = embed(ids)
        return merged[: self.config.text.max_length]

    def _slow(self) -> dict[str, np.ndarray]:
        """Slow K/V, padded on the right with values that must not matter."""
        longest = max(len(c["slow"]) * c["slow"].shape[1] for c in self.compressed)
        out = {}
        for name in slow_names(self.config):
            padded = []
            for row in self.compressed:
                value = row[name]
                padded.append(np.pad(value, ((0, 0), (0, 0), (0, longest - value.shape[2]), (0, 0)), constant_values=9))
            out[name] = np.concatenate(padded)
        return out

    def _attends(self, types: np.ndarray, visual: np.ndarray) -> np.ndarray:
        if self.config.slow_fast.attends == "all":
            return np.ones_like(visual)
        text = types <= TEXT
        if self.config.slow_fast.attends == "text-after-video":
            text &= (np.cumsum(visual, axis=1) > 0) | ~visual.any(1, keepdims=True)
        return text

    def feeds(self, where: slice) -> dict[str, np.ndarray]:
        """Decoder inputs for positions `where` of every row, without the text K/V."""
        feeds = {
            "inputs_embeds": self.embeds[:, where],
            "position_ids": self.positions[:, where],
            "attention_mask": self.golden.valid[:, where],
        }
        return feeds | self.slow_feeds(self.attends[:, where])

    def slow_feeds(self, attends: np.ndarray) -> dict[str, np.ndarray]:
        if not self.slow:
            return {}
        return {"slow_attends": attends, "slow_lengths": self.slow_lengths, **self.slow}


@each_golden
def test_onnx_vision_and_compressor(golden: Golden, load_graphs: Callable) -> None:
    graphs, want = load_graphs(golden), golden.outputs
    start = 0
    for b in range(golden.rows):
        pixels = golden.pixels(b)
        frames = slice(start, start := start + len(pixels))
        encoded = graphs.encode(pixels)
        features = encoded["vision_features"].reshape(want["vision_features"][frames].shape)
        assert_close("vision_features", features, want["vision_features"][frames])
        assert_close("projected", encoded["projected_features"], want["projected_features"][frames])
        slow = encoded["projected_features" if len(pixels) == 1 else "slow_tokens"]
        assert_close("slow", slow.reshape(want[f"slow_tokens_{b}"].shape), want[f"slow_tokens_{b}"])
        assert_close("fast", graphs.compress(slow)["fast_tokens"], want[f"fast_tokens_{b}"])


@each_golden
def test_onnx_vision_in_chunks_is_the_same(golden: Golden, load_graphs: Callable) -> None:
    graphs, pixels = load_graphs(golden), golden.pixels(0)
    chunks = [graphs.encode(pixels[i : i + 3])["slow_tokens"] for i in range(0, len(pixels), 3)]
    assert_close("chunks", np.concatenate(chunks), graphs.encode(pixels)["slow_tokens"])


@each_golden
def test_onnx_prefill(golden: Golden, load_graphs: Callable) -> None:
    graphs, want, valid = load_graphs(golden), golden.outputs, golden.valid
    batch = Batch(golden, graphs)
    assert_close("inputs_embeds", batch.embeds, want["inputs_embeds"], valid)
    out = graphs.decode(batch.feeds(slice(None)), TextCache(graphs.config, golden.rows))
    last = valid[:, -1]
    if last.any():
        assert_close("logits", out["logits"][last], want["prefill_logits"][last, -1])
    shape = want["hidden_states"][0].shape
    for i in range(graphs.config.text.num_layers - 1):
        assert_close(f"layer {i}", out[hidden_name(i)].reshape(shape), want["hidden_states"][i + 1], valid)
    last_layer = out[hidden_name(graphs.config.text.num_layers - 1)].reshape(shape)
    assert_close("last layer", last_layer, want["last_layer_output"], valid)
    for i in graphs.config.slow_fast.hybrid_layers[:1]:
        for name in ("hybrid_self_attn", "hybrid_attn_out"):
            assert_close(name, out[f"{name}.{i}"].reshape(want[name].shape), want[name], valid)


@each_golden
def test_onnx_logits_of_every_position_through_the_cache(golden: Golden, load_graphs: Callable) -> None:
    """One position at a time: each step's logits and the K/V handed on must be right."""
    graphs, want, valid = load_graphs(golden), golden.outputs, golden.valid
    batch = Batch(golden, graphs)
    cache, logits = TextCache(graphs.config, golden.rows), []
    for s in range(valid.shape[1]):
        logits.append(graphs.decode(batch.feeds(slice(s, s + 1)), cache)["logits"])
    assert_close("logits", np.stack(logits, axis=1), want["prefill_logits"], valid)


@each_decoded
@pytest.mark.parametrize("mode", ["released", "trained", "teacher"])
def test_onnx_decode(golden: Golden, mode: str, load_graphs: Callable) -> None:
    graphs, want, valid = load_graphs(golden), golden.outputs, golden.valid
    # 'teacher': trained mode fed the tokens of the released mode.
    ids_key, logits_key = {
        "released": ("greedy_ids", "decode_logits"),
        "trained": ("xattn_greedy_ids", "xattn_decode_logits"),
        "teacher": (None, "xattn_teacher_logits"),
    }[mode]
    batch = Batch(golden, graphs)
    cache = TextCache(graphs.config, golden.rows)
    out = graphs.decode(batch.feeds(slice(None)), cache)
    ids, logits, positions = [out["logits"].argmax(-1)], [], valid.sum(1, keepdims=True)
    for step in range(STEPS):
        token = want["greedy_ids"][:, step] if mode == "teacher" else ids[-1]
        feeds = {
            "inputs_embeds": graphs.embed(token)[:, None],
            "position_ids": positions + step,
            "attention_mask": np.ones((golden.rows, 1), dtype=bool),
            **batch.slow_feeds(np.full((golden.rows, 1), mode != "released")),
        }
        out = graphs.decode(feeds, cache)
        logits.append(out["logits"])
        ids.append(out["logits"].argmax(-1))
    if ids_key:
        assert np.array_equal(np.stack(ids, axis=1), want[ids_key])
    assert_close("decode logits", np.stack(logits, axis=1), want[logits_key])


# --- tables ------------------------------------------------------------------------------------------------


def fast_path_cases() -> dict[str, dict]:
    file = ROOT / "fast_path_cases.json"
    return json.loads((file if file.is_file() else Path(__file__).parent / "golden" / file.name).read_text())


def parse_case(name: str) -> tuple[int, FastPathConfig]:
    """T64_s2_t4_m16: frames, sampling stride, temporal stride, least fast frames."""
    total, sampling, temporal, least = (int(part[1:]) for part in name.split("_"))
    return total, FastPathConfig(sampling, temporal, 1, least)


def test_all_fast_path_cases_on_the_host() -> None:
    cases = fast_path_cases()
    assert len(cases) >= 936
    for name, case in cases.items():
        total, fast = parse_case(name)
        assert source_frames(total, fast) == case["sources"], name
        weights = frame_weights(total, fast)
        assert weights.shape == (case["fast_frames"], total), name
        for row, sources in zip(weights, case["sources"], strict=True):
            expected = np.bincount(sources, minlength=total) / len(sources)
            np.testing.assert_allclose(row, expected, rtol=1e-6, err_msg=name)


def test_all_fast_path_cases_in_torch() -> None:
    torch = pytest.importorskip("torch")
    from sfexport.model.compressor import fast_tokens

    for name, case in fast_path_cases().items():
        total, fast = parse_case(name)
        frames = torch.arange(total, dtype=torch.float32)[:, None, None] ** 2
        expected = [np.mean(np.array(s, dtype=np.float64) ** 2) for s in case["sources"]]
        np.testing.assert_allclose(fast_tokens(frames, fast)[:, 0].numpy(), expected, rtol=1e-6, err_msg=name)
