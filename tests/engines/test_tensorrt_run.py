"""The TensorRT backend, run on host memory: ONNX Runtime computes what an engine would (tests/engines/gpu.py).

It proves the handling of memory, shapes and profiles. That TensorRT computes the same is not proved here.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from gpu import VERSIONS, played_gpu
from hypothesis import given
from hypothesis import strategies as st

from sfexport.artifacts.bundle import Bundle
from sfexport.artifacts.engines import Engines
from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.demo.clip import write_frames
from sfexport.demo.scenes import FPS, SIZE, UPSCALE, video_frames
from sfexport.demo.shipped import SHIPPED
from sfexport.engines.build import build, open_backend
from sfexport.engines.tensorrt.build import TensorRTOptions
from sfexport.engines.tensorrt.graph_file import split_layers
from sfexport.errors import BundleError, InputError, SfexportError
from sfexport.exporting.export import ExportOptions, export
from sfexport.kernels.compile import compile_kernels
from sfexport.kernels.store import StoredKernels, save_kernels
from sfexport.machines.targets import find_target
from sfexport.qa.pipeline import Pipeline

pytest.importorskip("triton", reason="the plugin's kernel is written in Triton, which is not installed")
QUESTIONS = ("How many shapes are there?", "Describe the circle.", "Where does the circle move?")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle in fp32, its ONNX Runtime engines, a clip."""
    root = tmp_path_factory.mktemp("run")
    bundle = export(Checkpoint.open(SHIPPED), root / "bundle", ExportOptions())
    build(bundle, root / "cpu", "onnxruntime")
    write_frames(root / "clip.mp4", video_frames(2026, 7), FPS, (SIZE * UPSCALE, SIZE * UPSCALE))
    return root


def answers(pipeline: Pipeline, clip: Path) -> list[list[int]]:
    session = pipeline.encode(clip)
    options = pipeline.generation_options()
    return [session.ask(q, options, mode).ids for q in QUESTIONS for mode in ("released", "trained")]


@pytest.mark.parametrize("version", VERSIONS)
def test_answers_are_those_of_onnx_runtime(version, made, tmp_path, monkeypatch):
    bundle = Bundle.open(made / "bundle")
    expected = answers(Pipeline.load(made / "cpu"), made / "clip.mp4")
    with played_gpu(monkeypatch, version, tmp_path / "cache", bundle) as played:
        build(bundle, tmp_path / "engines", "tensorrt", tensorrt=TensorRTOptions(new_tokens=8, question_tokens=64))
        before = len(played.recorder.calls)
        assert answers(Pipeline.load(tmp_path / "engines"), made / "clip.mp4") == expected
        names = [call.name for call in played.recorder.calls[before:]]
    # The decoder has a context for prefill and one for decoding, which is switched to its profile once.
    assert names.count("IExecutionContext.set_optimization_profile_async") == 1
    assert names.count("IExecutionContext.set_device_memory") == 4
    assert "Runtime.gpu_allocator" in names and "Builder.gpu_allocator" in played.recorder.names()


def test_memory_does_not_grow_with_questions(made, tmp_path, monkeypatch):
    bundle = Bundle.open(made / "bundle")
    with played_gpu(monkeypatch, "10.3", tmp_path / "cache", bundle) as played:
        build(bundle, tmp_path / "engines", "tensorrt", tensorrt=TensorRTOptions(new_tokens=8, question_tokens=64))
        pipeline = Pipeline.load(tmp_path / "engines")
        session, options = pipeline.encode(made / "clip.mp4"), pipeline.generation_options()
        for mode in ("released", "trained"):
            session.ask("Describe the circle.", options, mode)
        live = played.driver.live
        for _ in range(20):
            session.ask("Describe the circle.", options, "trained")
            session.ask("Where does the circle move?", options, "released")
        assert played.driver.live == live
        del session
        backend = pipeline.backend
        second = pipeline.encode(made / "clip.mp4")
        assert second.ask("Describe the circle.", options, "trained").ids
        # Another video's slow K/V took the place of the first one's.
        assert played.driver.live <= live
        assert backend is pipeline.backend


def test_questions_are_decoded_together(made, tmp_path, monkeypatch):
    """As many as the engines are built for, with the tokens of one at a time."""
    bundle = Bundle.open(made / "bundle")
    with played_gpu(monkeypatch, "10.16", tmp_path / "cache", bundle):
        build(bundle, tmp_path / "engines", "tensorrt", tensorrt=TensorRTOptions(new_tokens=8, rows=3))
        pipeline = Pipeline.load(tmp_path / "engines")
        session, options = pipeline.encode(made / "clip.mp4"), pipeline.generation_options()
        for mode in ("released", "trained"):
            alone = [session.ask(question, options, mode).ids for question in QUESTIONS]
            assert [a.ids for a in session.ask_many(QUESTIONS, options, mode)] == alone
            assert [a.ids for a in session.ask_many(QUESTIONS, options, mode, batch=2)] == alone
        with pytest.raises(InputError, match="decode at most 3 questions together, not 4") as error:
            session.ask_many(QUESTIONS, options, batch=4)
        assert "--max-batch 4" in error.value.hint


@pytest.mark.parametrize("parts", [2, 4])
def test_a_decoder_in_several_engines_gives_the_same_tokens(parts, made, tmp_path, monkeypatch):
    bundle = Bundle.open(made / "bundle")
    expected = answers(Pipeline.load(made / "cpu"), made / "clip.mp4")
    with played_gpu(monkeypatch, "10.3", tmp_path / "cache", bundle) as played:
        options = TensorRTOptions(new_tokens=8, question_tokens=64, rows=3, split_decoder=parts)
        engines = build(bundle, tmp_path / "engines", "tensorrt", tensorrt=options)
        assert engines.content["split_decoder"] == parts
        assert set(engines.content["files"]) >= {f"decoder.{k}.engine" for k in range(parts)}
        assert "decoder.engine" not in engines.content["files"]
        pipeline = Pipeline.load(tmp_path / "engines")
        assert answers(pipeline, made / "clip.mp4") == expected
        session = pipeline.encode(made / "clip.mp4")
        options = replace(pipeline.generation_options(), stop_ids=frozenset(), max_new_tokens=6)
        alone = [session.ask(question, options).ids for question in QUESTIONS]
        played.driver.calls.clear()
        assert [a.ids for a in session.ask_many(QUESTIONS, options)] == alone
        launches = [name for name, _ in played.driver.calls].count("cuGraphLaunch")
        assert launches and launches % parts == 0
        (tmp_path / "engines" / "decoder.1.engine").unlink()
        with pytest.raises(BundleError, match=r"decoder\.1\.engine"):
            Engines.open(tmp_path / "engines")


def test_a_decoder_that_cannot_be_split_is_refused(made, tmp_path, monkeypatch):
    bundle = Bundle.open(made / "bundle")
    with played_gpu(monkeypatch, "10.3", tmp_path / "cache", bundle):
        with pytest.raises(InputError, match="--split-decoder 5 is more than the decoder's 4 layers"):
            build(bundle, tmp_path / "engines", "tensorrt", tensorrt=TensorRTOptions(split_decoder=5))
        with pytest.raises(InputError, match="--split-decoder"):
            TensorRTOptions(split_decoder=0)
        small = TensorRTOptions(target=find_target("jetson-orin-nano-8"))
        assert small.decoder_parts(bundle) == 4
        # A target's own number is no demand.
        few = replace(bundle.config, text=replace(bundle.config.text, num_layers=3))
        assert small.decoder_parts(SimpleNamespace(config=few)) == 3
        shutil.copytree(bundle.path, tmp_path / "edited")
        edited = Bundle.open(tmp_path / "edited")
        model = onnx.load(edited.graph_file("decoder"), load_external_data=False)
        model.doc_string = "mine"
        onnx.save(model, edited.graph_file("decoder"))
        with pytest.raises(InputError, match="cannot be split"):
            build(edited, tmp_path / "engines", "tensorrt", tensorrt=TensorRTOptions(split_decoder=2))
        assert not (tmp_path / "engines").exists()


@given(layers=st.integers(1, 80), parts=st.integers(1, 80), vocabulary=st.integers(1, 300_000))
def test_parts_of_a_decoder_hold_every_layer_once(layers, parts, vocabulary):
    text = replace(Checkpoint.open(SHIPPED).config.text, num_layers=layers, vocab_size=vocabulary)
    if parts > layers:
        with pytest.raises(InputError):
            split_layers(text, parts)
        return
    found = split_layers(text, parts)
    assert len(found) == parts and all(found)
    assert [i for part in found for i in part] == list(range(layers))


def test_key_values_go_to_the_host_and_back(made, tmp_path, monkeypatch):
    bundle = Bundle.open(made / "bundle")
    rng = np.random.default_rng(0)
    with played_gpu(monkeypatch, "11.4", tmp_path / "cache", bundle):
        build(bundle, tmp_path / "engines", "tensorrt")
        backend = open_backend(Engines.open(tmp_path / "engines"))
        text = bundle.config.text
        shape = (1, text.num_kv_heads, 5, text.head_dim)
        arrays = [rng.standard_normal(shape).astype(np.float32) for _ in range(2 * text.num_layers)]
        held = backend.from_numpy(arrays)
        assert held.length == 5
        for array, back in zip(arrays, backend.to_numpy(held), strict=True):
            np.testing.assert_array_equal(array, back)


def test_what_does_not_fit_the_engines_is_refused_by_name(made, tmp_path, monkeypatch):
    bundle = Bundle.open(made / "bundle")
    with played_gpu(monkeypatch, "10.16", tmp_path / "cache", bundle):
        options = TensorRTOptions(frames=16, question_tokens=32, new_tokens=60)
        build(bundle, tmp_path / "engines", "tensorrt", tensorrt=options)
        pipeline = Pipeline.load(tmp_path / "engines")
        with pytest.raises(InputError, match="take at most 16 frames of a video, not 20") as error:
            pipeline.encode(made / "clip.mp4", frames=20)
        assert "--frames" in error.value.hint
        session = pipeline.encode(made / "clip.mp4")
        long = "How many shapes are there? " * 5
        with pytest.raises(InputError, match="inputs_embeds of shape") as error:
            session.ask(long, pipeline.generation_options())
        assert "--max-question-tokens" in error.value.hint
        # The answer goes on until prompt and answer pass what the buffers hold.
        endless = replace(pipeline.generation_options(), stop_ids=frozenset(), max_new_tokens=99)
        with pytest.raises(InputError, match=r"reach \d+ tokens; these engines are built for") as error:
            session.ask("Describe the circle.", endless, "trained")
        assert "--max-new-tokens" in error.value.hint
        assert session.ask("How many shapes are there?", pipeline.generation_options()).ids


def test_engines_from_elsewhere_are_refused_before_they_are_read(made, tmp_path, monkeypatch):
    bundle = Bundle.open(made / "bundle")
    with played_gpu(monkeypatch, "10.3", tmp_path / "cache", bundle) as played:
        build(bundle, tmp_path / "engines", "tensorrt")
        read = played.recorder.names().count("Runtime.deserialize_cuda_engine")
        played.driver._attributes |= {"major": 9, "minor": 0}
        from sfexport.engines.tensorrt.cuda import device_sm

        device_sm.cache_clear()
        with pytest.raises(BundleError, match=r"built on Orin \(SM 8\.7\); this machine's GPU is of SM 9\.0.*"):
            open_backend(Engines.open(tmp_path / "engines"))
        assert played.recorder.names().count("Runtime.deserialize_cuda_engine") == read
    with (
        played_gpu(monkeypatch, "10.16", tmp_path / "cache", bundle),
        pytest.raises(BundleError, match=r"built with tensorrt 10\.3.*this machine has tensorrt 10\.16"),
    ):
        open_backend(Engines.open(tmp_path / "engines"))


def test_without_a_driver_nothing_of_tensorrt_is_touched(made, tmp_path, monkeypatch):
    bundle = Bundle.open(made / "bundle")
    with played_gpu(monkeypatch, "10.3", tmp_path / "cache", bundle) as played:
        build(bundle, tmp_path / "engines", "tensorrt")
        before = len(played.recorder.calls)

        def no_driver(flags: int) -> tuple[int]:
            raise RuntimeError("Failed to dlopen libcuda.so.1")

        played.driver.cuInit = no_driver
        from sfexport.engines.tensorrt.cuda import initialise

        initialise.cache_clear()
        with pytest.raises(SfexportError, match="no NVIDIA driver"):
            open_backend(Engines.open(tmp_path / "engines"))
        with pytest.raises(SfexportError, match="no NVIDIA driver"):
            build(bundle, tmp_path / "more", "tensorrt")
        assert len(played.recorder.calls) == before


def test_a_ptx_text_is_compiled_once(tmp_path, monkeypatch):
    """However many nodes, contexts and clones launch it."""
    from sfexport.engines.tensorrt.cuda import Function

    with played_gpu(monkeypatch, "10.3", tmp_path / "cache") as played:
        functions = [Function(ptx, "kernel", 128, 0) for ptx in ("// one", "// two", "// one")]
        assert played.driver.modules == [b"// one\0", b"// two\0"]
        assert functions[0]._function == functions[2]._function != functions[1]._function


def test_kernels_with_other_parameters_are_refused(tmp_path):
    """Their `attends` was a byte for each position; read as int32 it would be other positions."""
    save_kernels(tmp_path, compile_kernels("fp16", 32, 87, 85))
    assert StoredKernels(tmp_path)("fp16", 32, 87, 85)
    index = json.loads((tmp_path / "kernels.json").read_text())
    for old in (index["kernels"], index | {"format": 1}, {"format": 2}):
        (tmp_path / "kernels.json").write_text(json.dumps(old))
        with pytest.raises(BundleError, match="cannot be used"):
            StoredKernels(tmp_path)
