"""Define the public functions, which the commands of the command line call too.

Each is available as `sfexport.<name>` and imports what it needs when it is called.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfexport.progress import OnProgress, OnStep, no_progress, no_step
from sfexport.values import as_output, as_path, directory_name

if TYPE_CHECKING:
    from sfexport.artifacts.bundle import Bundle
    from sfexport.artifacts.engines import Engines
    from sfexport.comparing.parity_report import ParityReport
    from sfexport.doctor.diagnosis import Diagnosis
    from sfexport.engines.tensorrt.preflight import Readiness
    from sfexport.planning.plan import Plan
    from sfexport.qa.pipeline import Pipeline


def export(
    checkpoint: str | Path,
    output: str | Path | None = None,
    *,
    frames: int | None = None,
    weights: str = "auto",
    precision: str = "fp32",
    quantize: str | None = None,
    lm_head: str | None = None,
    split_lm_head: int = 1,
    digest: str = "sampled",
    on_step: OnStep = no_step,
) -> Bundle:
    """Write a checkpoint's three graphs, tokenizer and manifest as a bundle; it is written completely or not at all.

    Args:
        checkpoint: directory of a Slow-Fast checkpoint: config.json, tokenizer, safetensors.
        output: directory to write; default ./<checkpoint name>-bundle. Only an earlier bundle is replaced.
        frames: frames sampled from a video by default; default the checkpoint's number, else 64.
        weights: 'reference' points into the checkpoint's shards, 'copy' copies them, 'auto' copies up to 64 MB.
        precision: 'fp32', 'fp16' or 'bf16': the type that the graphs compute in.
        quantize: 'int4' rounds the decoder's weights to 4 bits; the bundle then contains all weights.
        lm_head: 'int8' (the default), 'int4' or 'fp16': the language-model head of a quantized bundle.
        split_lm_head: number of parts to split the language-model head into.
        digest: digests of referenced weights: 'sampled' blocks of every tensor, or 'full': every byte too.
        on_step: called with one line of text per step.

    Raises:
        CheckpointError: a tensor is missing or misshapen, or the configuration cannot be exported.
        InputError: an option is invalid, the output cannot be written, or the disk is too small.
    """
    from sfexport.checkpoint.checkpoint import Checkpoint
    from sfexport.exporting.export import ExportOptions
    from sfexport.exporting.export import export as export_checkpoint

    checkpoint = as_path(checkpoint, "The checkpoint")
    output = Path(f"{directory_name(checkpoint)}-bundle") if output is None else as_output(output)
    opened = Checkpoint.open(checkpoint)
    options = ExportOptions(frames, weights, precision, quantize, lm_head, split_lm_head, digest)
    return export_checkpoint(opened, output, options, on_step)


def build(
    source: str | Path,
    output: str | Path | None = None,
    *,
    backend: str = "auto",
    target: str | None = None,
    jetpack: str | None = None,
    precision: str = "auto",
    quantize: str | None = None,
    lm_head: str | None = None,
    frames: int | None = None,
    max_question_tokens: int | None = None,
    max_new_tokens: int | None = None,
    max_batch: int | None = None,
    split_decoder: int | None = None,
    kernels: str | Path | None = None,
    optimization_level: int | None = None,
    force: bool = False,
    on_step: OnStep = no_step,
    on_progress: OnProgress = no_progress,
) -> Engines:
    """Build engines from a bundle, or from a checkpoint, which is exported to a bundle beside them first.

    Args:
        source: directory of a bundle or a checkpoint.
        output: directory to write; default ./<source name>-engines/<target>-<runtime>. Only earlier engines are
            replaced.
        backend: 'onnxruntime', 'tensorrt', 'tensorrt-rtx', 'torch'; 'auto': TensorRT beside a GPU, else ONNX Runtime.
        target, jetpack: name of the machine that TensorRT engines are for (default this one), and its JetPack.
        precision: 'fp32', 'fp16', 'bf16' or 'auto', for a checkpoint; 'auto' is the weights' 16-bit type for
            TensorRT (fp16 for fp32 weights) and fp32 elsewhere.
        quantize, lm_head: 'int4' rounds a checkpoint's decoder to 4 bits, its head to 'int8', 'int4' or 'fp16'.
        frames: largest number of frames of a video (TensorRT); default the bundle's.
        max_question_tokens: largest number of text tokens of a prompt (TensorRT); default 512.
        max_new_tokens, max_batch: tokens of an answer (256), questions that are decoded together (8) (TensorRT).
        split_decoder: number of engines to split the decoder into (TensorRT); default the target's, mostly 1.
        kernels: directory of compiled kernels that `check_build` wrote (TensorRT without Triton).
        optimization_level: TensorRT's level, 0 (builds fastest) to 5 (runs fastest); default TensorRT's own.
        force: build even if the weights do not seem to fit into memory.
        on_step, on_progress: called with a line per step; with a TensorRT phase, its finished and its total steps.

    Raises:
        MissingDependency: the backend's library is not installed.
        CheckpointError, BundleError: the source is incomplete or damaged, or a weight is not finite.
        InputError: an option is invalid, the bundle differs from what is asked for, or the output cannot be replaced.
        SfexportError: the runtime refuses a graph, the weights do not fit into memory, or there is no GPU.
    """
    from sfexport.engines import build as building
    from sfexport.engines.build_arguments import Sizes, export_request, output_paths, tensorrt_options
    from sfexport.exporting.open_or_export import open_or_export

    source = as_path(source, "The source")
    sizes = Sizes(frames, max_question_tokens, max_new_tokens, max_batch, split_decoder)
    options = tensorrt_options(target, jetpack, kernels, sizes, optimization_level)
    backend = building.choose_backend("tensorrt" if target is not None and backend == "auto" else backend)
    building.check_backend(backend, precision, options)
    bundle_path, output = output_paths(source, output, backend, target)
    request = export_request(backend, options, precision, quantize, lm_head)
    bundle = open_or_export(source, bundle_path, output, request, on_step=on_step)
    return building.build(bundle, output, backend, on_step, force, options, on_progress)


def check_build(
    source: str | Path,
    output: str | Path | None = None,
    *,
    target: str | None,
    jetpack: str | None = None,
    precision: str = "auto",
    quantize: str | None = None,
    lm_head: str | None = None,
    frames: int | None = None,
    max_question_tokens: int | None = None,
    max_new_tokens: int | None = None,
    max_batch: int | None = None,
    split_decoder: int | None = None,
    kernels: str | Path | None = None,
    optimization_level: int | None = None,
    on_step: OnStep = no_step,
) -> Readiness:
    """Check a TensorRT build for a target on any machine: nodes, types, kernels, shapes and memory.

    Args:
        output: directory to write for the target: compiled kernels, build script, README; default: none is written.
        target: name of the machine that the engines are for.

    The other arguments are those of `build`.

    Raises:
        CheckpointError, BundleError: the source is incomplete or damaged.
        InputError: an option is invalid, or the output cannot be replaced.
    """
    from tempfile import TemporaryDirectory

    from sfexport.engines.build_arguments import Sizes, export_request, tensorrt_options
    from sfexport.engines.tensorrt.preflight import BUILD_FILE, write_build_directory
    from sfexport.engines.tensorrt.preflight import check_build as check_bundle
    from sfexport.errors import InputError
    from sfexport.exporting.open_or_export import open_or_export

    source = as_path(source, "The source")
    output = None if output is None else as_output(output)
    sizes = Sizes(frames, max_question_tokens, max_new_tokens, max_batch, split_decoder)
    options = tensorrt_options(target, jetpack, kernels, sizes, optimization_level)
    if options.target is None:
        raise InputError("--check needs a --target.", "Name one, such as --target jetson-orin-agx-64.")
    request = export_request("tensorrt", options, precision, quantize, lm_head)
    with TemporaryDirectory() as folder:
        bundle = open_or_export(source, Path(folder) / "bundle", output, request, BUILD_FILE, on_step)
        found = check_bundle(bundle, options.target, options)
    if output is not None:
        write_build_directory(found, output)
    return found


def load(engines: str | Path) -> Pipeline:
    """Open engines to ask about videos: `load("engines").encode("clip.mp4").ask("What happens?").answer`.

    Args:
        engines: directory that `build` wrote.

    Raises:
        BundleError: the directory is not usable here, or was built for another runtime, version or GPU.
        MissingDependency: the engines' runtime is not installed.
    """
    from sfexport.qa.pipeline import Pipeline

    return Pipeline.load(engines)


def parity(
    engines: str | Path | Pipeline,
    video: str | Path | None = None,
    *,
    question: str | None = None,
    frames: int | None = None,
    max_new_tokens: int = 16,
    atol: float | None = None,
    rtol: float | None = None,
    on_step: OnStep = no_step,
) -> ParityReport:
    """Compare engines with PyTorch, graph by graph and answer by answer.

    Args:
        engines: directory that `build` wrote, or what `load` returned.
        video: clip or picture to compare on; default frames of noise.
        question: default "What happens in the video?".
        frames: frames sampled from the video; default the bundle's number.
        max_new_tokens: tokens per answer.
        atol: absolute tolerance; default by precision, 1e-4 in fp32.
        rtol: tolerance relative to the largest PyTorch value; default by precision, 1e-4 in fp32.
        on_step: called with one line of text per step.

    Raises:
        MissingDependency: torch or transformers is not installed.
        BundleError: the engines or the checkpoint they came from are not usable here.
        InputError, VideoError: an option is invalid, or the video cannot be read.
    """
    from sfexport.comparing.run import DEFAULT_QUESTION, run_parity, tolerance_for
    from sfexport.qa.pipeline import Pipeline

    pipeline = engines if isinstance(engines, Pipeline) else Pipeline.load(engines)
    tolerance = tolerance_for(pipeline, atol, rtol)
    question = DEFAULT_QUESTION if question is None else question
    return run_parity(pipeline, video, question, frames, max_new_tokens, tolerance, on_step)


def plan(
    checkpoint: str | Path, target: str | None = None, *, frames: int | None = None, jetpack: str | None = None
) -> Plan:
    """Compute the memory and speed of a checkpoint on a target, without building anything.

    Args:
        checkpoint: directory of a Slow-Fast checkpoint.
        target: name of a target, 'all', or 'cpu' for ONNX Runtime on this machine; default this machine.
        frames: frames of a video; default the checkpoint's number, else 64.
        jetpack: the target's JetPack version; default the target's.

    Raises:
        InputError: the target or JetPack is unknown, or no question fits beside that many frames.
        CheckpointError: the checkpoint is incomplete or damaged.
    """
    from sfexport.planning.plan import plan as plan_checkpoint

    return plan_checkpoint(as_path(checkpoint, "The checkpoint"), target, frames, jetpack)


def inspect(path: str | Path) -> dict[str, Any]:
    """Describe a checkpoint, bundle or engine directory: config, inputs and outputs, sizes, versions.

    Returns:
        What `sfexport inspect --json` prints; its `kind` is 'checkpoint', 'bundle' or 'engines'.

    Raises:
        InputError: the directory is none of them.
        CheckpointError, BundleError: the directory is incomplete or damaged.
    """
    from sfexport.artifacts.inspect import inspect as inspect_directory

    return inspect_directory(as_path(path, "The directory"))


def diagnose(target: str | None = None) -> Diagnosis:
    """Check whether engines can be built and run on this machine, and list the commands that fix what is missing.

    Args:
        target: name of the machine that engines are wanted for; default this one.

    Raises:
        InputError: the target is unknown.
    """
    from sfexport.doctor.diagnosis import examine
    from sfexport.machines.machine import detect_machine
    from sfexport.machines.targets import find_target

    return examine(detect_machine(), find_target(target) if target is not None else None)
