"""The command line: one function per verb; arguments in, one call, result out.

Nothing heavy is imported before a verb runs: `sfexport --help` needs click alone.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from sfexport import __version__, console
from sfexport.errors import SfexportError

DIRECTORY = click.Path(path_type=Path)
MODES = click.Choice(["released", "trained"])
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, nothing else.")


class _Commands(click.Group):
    """Turns exceptions into one paragraph and an exit code; SFEXPORT_DEBUG=1 shows the traceback instead."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if os.environ.get("SFEXPORT_DEBUG") == "1":
                raise
            expected = isinstance(error, SfexportError)
            message = error.paragraph() if expected else _unexpected(error)
            click.echo(f"Error: {' '.join(message.split())}", err=True)
            ctx.exit(error.exit_code if expected else 1)


def _unexpected(error: Exception) -> str:
    return (
        f"{type(error).__name__}: {error or 'no message'}. sfexport did not expect this; "
        "run again with SFEXPORT_DEBUG=1 for the traceback and report it."
    )


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="sfexport")
def main() -> None:
    """Slow-Fast Video MLLM checkpoints to engines that answer questions about videos offline.

    \b
    The whole way on a tiny model:  sfexport demo
    The usual way:                  sfexport build CHECKPOINT -o ENGINES
                                    sfexport ask ENGINES video.mp4 -q "What happens in the video?"
    """


def _with_examples(*examples: str) -> Callable[[click.Command], click.Command]:
    """Show examples at the end of a command's help."""

    def attach(command: click.Command) -> click.Command:
        command.epilog = "\b\nExamples:\n" + "\n".join(f"  {line}" for line in examples)
        return command

    return attach


@_with_examples("sfexport demo", "sfexport demo -o /tmp/demo")
@main.command()
@click.option(
    "-o", "--output", type=DIRECTORY, default=Path("sfexport-demo"), show_default=True, help="Where to keep it all."
)
@click.pass_context
def demo(ctx: click.Context, output: Path) -> None:
    """Go the whole way once on a tiny model: checkpoint, export, build, ask, parity."""
    from sfexport.demo.run import run_demo

    if not run_demo(output):
        ctx.exit(1)


@_with_examples(
    "sfexport export ./checkpoint",
    "sfexport export ./checkpoint -o ./bundle --frames 96",
    "sfexport export ./checkpoint -o ./small --quantize int4 --precision fp16",
)
@main.command()
@click.argument("checkpoint", type=DIRECTORY)
@click.option("-o", "--output", type=DIRECTORY, help="The bundle directory.  [default: ./<checkpoint name>-bundle]")
@click.option(
    "--frames", type=int, help="Frames sampled from a video by default.  [default: the checkpoint's, else 64]"
)
@click.option(
    "--weights",
    type=click.Choice(["auto", "reference", "copy"]),
    default="auto",
    show_default=True,
    help="Point into the checkpoint's shards (reference), take them along (copy), or copy up to 64 MB (auto).",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    default="fp32",
    show_default=True,
    help="What the graphs compute in, whatever the weights are stored in.",
)
@click.option(
    "--quantize",
    type=click.Choice(["int4"]),
    help="Round the decoder's weights to 4 bits; the bundle then holds all weights itself.",
)
@click.option(
    "--lm-head",
    type=click.Choice(["int8", "fp16"]),
    help="The language-model head of a quantised bundle; fp16: 16 bits, not rounded.  [default: int8]",
)
@click.option(
    "--split-lm-head", type=int, default=1, show_default=True, help="Pieces the language-model head is computed in."
)
@json_option
def export(checkpoint: Path, output: Path | None, as_json: bool, **options: Any) -> None:
    """Write a CHECKPOINT's three graphs as a bundle. Takes seconds: weights are not copied unless they are small.

    With --quantize the weights are read, rounded and written as they stream by: minutes for a large model.
    """
    from sfexport.checkpoint import Checkpoint
    from sfexport.graphs.bundle import ExportOptions, export
    from sfexport.inspection import inspect

    output = output or Path(f"{_name(checkpoint)}-bundle")
    bundle = export(Checkpoint.open(checkpoint), output, ExportOptions(**options), console.step)
    if as_json:
        click.echo(json.dumps(inspect(bundle.path)))
        return
    how = bundle.content["options"]["weights"]
    where = "copied into it" if how == "copy" else f"left in {bundle.weights_directory}"
    console.say(f"bundle written to {output} (weights {where})", err=False)
    console.say(f"next: sfexport build {output}", err=False)


@_with_examples(
    "sfexport build ./checkpoint",
    "sfexport build ./bundle -o ./engines --backend onnxruntime",
    "sfexport build ./checkpoint --target jetson-orin-agx-64 --check -o ./for-the-orin",
    "sfexport build ./checkpoint --backend tensorrt --frames 96 --max-new-tokens 512",
)
@main.command()
@click.argument("source", metavar="CHECKPOINT|BUNDLE", type=DIRECTORY)
@click.option(
    "-o", "--output", type=DIRECTORY, help="The engine directory.  [default: ./<name>-engines/<target>-<runtime>]"
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "onnxruntime", "tensorrt", "torch"]),
    default="auto",
    show_default=True,
    help="What runs the graphs: TensorRT where it is installed beside a GPU, else ONNX Runtime (auto); torch is the "
    "PyTorch model itself, for comparison.",
)
@click.option("--target", help="The machine TensorRT engines are for, as in 'sfexport doctor'.  [default: this one]")
@click.option("--jetpack", help="The target's JetPack, for --check.  [default: the target's]")
@click.option("--check", is_flag=True, help="Build nothing: check a TensorRT build for --target, on any machine.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "fp16", "bf16"]),
    default="auto",
    show_default=True,
    help="For a CHECKPOINT. auto: for TensorRT the weights' own type (fp16 for fp32 weights), else fp32.",
)
@click.option("--frames", type=int, help="Most frames of a video (TensorRT).  [default: the bundle's]")
@click.option("--max-question-tokens", type=int, help="Most text tokens of a prompt (TensorRT).  [default: 512]")
@click.option("--max-new-tokens", type=int, help="Most tokens of an answer (TensorRT).  [default: 256]")
@click.option("--kernels", type=DIRECTORY, help="Kernels compiled by --check elsewhere (TensorRT without Triton).")
@click.option(
    "--optimization-level",
    type=click.IntRange(0, 5),
    help="TensorRT's: 0 builds fastest, 5 runs fastest.  [default: TensorRT's]",
)
@click.option("--force", is_flag=True, help="Build even if the weights do not seem to fit into memory.")
@json_option
@click.pass_context
def build(
    ctx: click.Context,
    source: Path,
    output: Path | None,
    backend: str,
    target: str | None,
    jetpack: str | None,
    check: bool,
    precision: str,
    force: bool,
    as_json: bool,
    **tensorrt: Any,
) -> None:
    """Build engines from a BUNDLE, or from a CHECKPOINT (which is exported beside them first).

    With --check: what a TensorRT build for --target will meet, without the target; -o then names a directory to take
    there. Exits with 1 if there is a gap.
    """
    from sfexport.engines.build import build, choose_backend, engine_name
    from sfexport.graphs.source import bundle_from
    from sfexport.inspection import inspect

    options = _tensorrt_options(target, jetpack, tensorrt)
    if check:
        passed = _check_build(source, output, precision, options, as_json)
        ctx.exit(0 if passed else 1)
    backend = choose_backend("tensorrt" if target and backend == "auto" else backend)
    beside = Path(f"{_name(source)}-bundle") if output is None else output.with_name(f"{output.name}-bundle")
    output = output or Path(f"{_name(source)}-engines") / engine_name(backend, target)
    bundle = bundle_from(source, beside, output, precision, backend == "tensorrt", report=console.step)
    with console.build_progress() as on_progress:
        engines = build(bundle, output, backend, console.step, force, options, on_progress)
    if as_json:
        click.echo(json.dumps(inspect(engines.path)))
        return
    console.say(f"engines written to {output}", err=False)
    console.say(f"next: sfexport ask {output} VIDEO -q 'What happens in the video?'", err=False)


def _tensorrt_options(target: str | None, jetpack: str | None, given: dict[str, Any]) -> Any:
    from sfexport.engines.build_tensorrt import TensorRTOptions
    from sfexport.errors import InputError
    from sfexport.machines.targets import find_target

    if jetpack and not target:
        raise InputError("--jetpack needs a --target.", "For instance --target jetson-orin-agx-64.")
    return TensorRTOptions(
        target=find_target(target, jetpack) if target else None,
        frames=given["frames"],
        question_tokens=given["max_question_tokens"],
        new_tokens=given["max_new_tokens"],
        kernels=given["kernels"],
        optimization_level=given["optimization_level"],
    )


def _check_build(source: Path, output: Path | None, precision: str, options: Any, as_json: bool) -> bool:
    """Print what a build for the target will meet; write a directory for it where one is asked for."""
    from tempfile import TemporaryDirectory

    from sfexport.engines.readiness import KIT_FILE, check_build, write_kit
    from sfexport.errors import InputError
    from sfexport.graphs.source import bundle_from

    if options.target is None:
        raise InputError("--check needs a --target.", "For instance --target jetson-orin-agx-64.")
    with TemporaryDirectory() as folder:
        beside = Path(folder) / "bundle"
        bundle = bundle_from(source, beside, output, precision, half=True, ours=KIT_FILE, report=console.step)
        readiness = check_build(bundle, options.target, options)
    if output is not None:
        write_kit(readiness, output)
    if as_json:
        click.echo(json.dumps(readiness.to_json()))
        return readiness.passed
    target = readiness.target
    system = f"JetPack {target.jetpack}, " if target.jetpack else ""
    title = (
        f"{target.name}: {system}TensorRT {target.tensorrt}, {readiness.precision}, {readiness.limits.frames} frames"
    )
    console.table(title, ("what", "checked", "found", "verdict"), readiness.rows())
    if output is not None:
        console.say(f"taken along in {output}; on the target: {output.name}/build.sh CHECKPOINT", err=False)
    return readiness.passed


def _name(path: Path) -> str:
    return path.resolve().name


@_with_examples(
    "sfexport ask ./engines clip.mp4 -q 'What happens in the video?'",
    "sfexport ask ./engines clip.mp4 -q 'Who is it?' -q 'Where?' --mode trained --json",
    "sfexport ask ./engines clip.mp4 -q 'Describe it.' --temperature 0.7 --top-p 0.9 --seed 1",
)
@main.command()
@click.argument("engines", type=DIRECTORY)
@click.argument("video", type=DIRECTORY)
@click.option("-q", "--question", "questions", multiple=True, required=True, help="A question; may be repeated.")
@click.option(
    "--mode", type=MODES, help="Whether answer tokens see the slow tokens (trained) or not.  [default: the model's]"
)
@click.option("--frames", type=int, help="Frames sampled from the video.  [default: the bundle's]")
@click.option(
    "--sampling",
    type=click.Choice(["linspace", "eval"]),
    default="linspace",
    show_default=True,
    help="Frame sampling rule.",
)
@click.option("--max-new-tokens", type=int, help="Length limit of an answer.  [default: the checkpoint's, else 256]")
@click.option("--temperature", type=float, help="0 is greedy.  [default: the checkpoint's]")
@click.option("--top-k", type=int, help="Sample among the k likeliest tokens only.")
@click.option("--top-p", type=float, help="Sample among the likeliest tokens with this mass only.")
@click.option("--repetition-penalty", type=float, help="Above 1: less likely to repeat itself.")
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option("--stop", multiple=True, help="A further token that ends the answer; may be repeated.")
@json_option
def ask(
    engines: Path,
    video: Path,
    questions: tuple[str, ...],
    mode: str | None,
    frames: int | None,
    sampling: str,
    stop: tuple[str, ...],
    as_json: bool,
    **generation: Any,
) -> None:
    """Answer questions about a VIDEO (or a picture) with ENGINES. The video is encoded once for all questions."""
    from sfexport.qa.pipeline import Pipeline

    pipeline = Pipeline.load(engines)
    options = pipeline.generation_options().override(**generation)
    stops = {pipeline.tokenizer.token_id(text) for text in stop}
    options = options.override(stop_ids=options.stop_ids | stops)
    with console.frames_progress("encoding") as on_frames:
        session = pipeline.encode(video, frames, sampling, questions, on_frames)
    answers = []
    for question in questions:
        if not as_json:
            click.echo(f"Q: {question}\nA: ", nl=False)
        answers.append(session.ask(question, options, mode, None if as_json else _stream))
        if not as_json:
            click.echo()
    if as_json:
        head = {"video": str(video), "engines": str(engines), "backend": pipeline.backend.name}
        head |= {"mode": mode or pipeline.bundle.facts.slow_fast.decode_mode, "frames": session.frames}
        head |= {"fast_tokens": session.fast_tokens, "slow_tokens": session.slow_tokens}
        click.echo(json.dumps(head | {"questions": [asdict(answer) for answer in answers]}))


def _stream(text: str) -> None:
    click.echo(console.printable(text) if sys.stdout.isatty() else text, nl=False)


@_with_examples("sfexport inspect ./checkpoint", "sfexport inspect ./engines --json")
@main.command()
@click.argument("path", type=DIRECTORY)
@json_option
def inspect(path: Path, as_json: bool) -> None:
    """Show what is in a checkpoint, bundle or engine directory: facts, inputs and outputs, sizes, versions."""
    from sfexport.inspection import graph_rows, inspect, rows

    document = inspect(path)
    if as_json:
        click.echo(json.dumps(document))
        return
    console.table(document["kind"], ("", ""), rows(document))
    if lines := graph_rows(document):
        console.table("graphs", ("graph", "", "name", "dtype", "shape"), lines)


@_with_examples("sfexport parity ./engines", "sfexport parity ./engines clip.mp4 --frames 16 --json")
@main.command()
@click.argument("engines", type=DIRECTORY)
@click.argument("video", type=DIRECTORY, required=False)
@click.option(
    "-q", "--question", default="What happens in the video?", show_default=True, help="The question to answer."
)
@click.option("--frames", type=int, help="Frames sampled from the video.  [default: the bundle's]")
@click.option("--max-new-tokens", type=int, default=16, show_default=True, help="Tokens per answer.")
@click.option("--atol", type=float, help="Absolute tolerance.  [default: 1e-4 in fp32, more in fp16 and bf16]")
@click.option("--rtol", type=float, help="Tolerance relative to the largest PyTorch value.  [default: as for --atol]")
@json_option
@click.pass_context
def parity(
    ctx: click.Context,
    engines: Path,
    video: Path | None,
    question: str,
    frames: int | None,
    max_new_tokens: int,
    atol: float | None,
    rtol: float | None,
    as_json: bool,
) -> None:
    """Compare ENGINES with PyTorch, graph by graph and answer by answer, on a VIDEO (or on noise).

    Exits with 0 if everything is within tolerance and the answers are the same, with 1 if not.
    """
    from sfexport.parity.report import show
    from sfexport.parity.run import run_parity, tolerance_for
    from sfexport.qa.pipeline import Pipeline

    pipeline = Pipeline.load(engines)
    tolerance = tolerance_for(pipeline, atol, rtol)
    report = run_parity(pipeline, video, question, frames, max_new_tokens, tolerance, console.step)
    if as_json:
        click.echo(json.dumps(report.to_json()))
    else:
        show(report)
    if not report.passed:
        ctx.exit(1)


@_with_examples("sfexport doctor", "sfexport doctor --target jetson-orin-agx-64 --json")
@main.command()
@click.option("--target", help="What engines are wanted for.  [default: this machine]")
@json_option
@click.pass_context
def doctor(ctx: click.Context, target: str | None, as_json: bool) -> None:
    """Show whether engines can be built and run here, and the commands that mend what is missing.

    Exits with 0 if TensorRT engines can be built, or if there is no NVIDIA GPU and ONNX Runtime works, with 1 if not.
    """
    from sfexport.doctor.report import examine, show
    from sfexport.machines.machine import look
    from sfexport.machines.targets import find_target

    report = examine(look(), find_target(target) if target else None)
    if as_json:
        click.echo(json.dumps(report.to_json()))
    else:
        show(report)
    ctx.exit(report.exit_code)


@_with_examples(
    "sfexport plan ./checkpoint --target jetson-orin-agx-64 --frames 96", "sfexport plan ./checkpoint --target all"
)
@main.command()
@click.argument("checkpoint", type=DIRECTORY)
@click.option("--target", help="A target as in 'sfexport doctor', 'cpu' or 'all'.  [default: this machine]")
@click.option("--jetpack", help="The target's JetPack.  [default: the target's]")
@click.option("--frames", type=int, help="Frames of a video.  [default: the checkpoint's, else 64]")
@json_option
def plan(checkpoint: Path, target: str | None, jetpack: str | None, frames: int | None, as_json: bool) -> None:
    """Compute what a CHECKPOINT takes on a target, before anyone waits for a build: memory and speed."""
    from sfexport.planning.plan import plan
    from sfexport.planning.report import show

    found = plan(checkpoint, target, frames, jetpack)
    if as_json:
        click.echo(json.dumps(found.to_json()))
    else:
        show(found)
