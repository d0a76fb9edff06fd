"""Print a Plan in 80 columns: its tables, then the assumptions behind the figures."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from sfexport import console
from sfexport.engines.memory import MEASURED_WITH
from sfexport.planning.plan import CPU, SYSTEM_BYTES, Figures, Plan, TargetPlan

GB, MB = 1e9, 1e6
WIDTH = 80
_WEIGHTS = {
    "tower": "vision tower",
    "projector": "projector",
    "compressor": "compressor",
    "decoder": "decoder's layers",
    "head": "decoder's head",
}


def show(plan: Plan) -> None:
    """Print a plan on stdout: one target in full, several with one row for each Storage."""
    if len(plan.targets) == 1:
        target = plan.targets[0]
        unit = GB if max(figures.memory.run for figures in target.figures) >= GB else MB
        header = ("GB" if unit == GB else "MB", *(figures.storage.name for figures in target.figures))
        console.table(f"{_machine(target)} (computed)", header, list(_rows(target, unit)))
    else:
        header = ("target", "stored", "run", "build", "fits", "first s", "next", "tok/s")
        rows = [row for target in plan.targets for row in _lines(target)]
        console.table("every target (computed; run and build: GB)", header, rows)
    for note in notes(plan):
        for line in textwrap.wrap(note, WIDTH):
            console.result(line)


def _machine(target: TargetPlan) -> str:
    jetpack = f", JetPack {target.jetpack}" if target.jetpack else ""
    memory = f", {target.memory / GB:.0f} GB" if target.memory else ""
    name = "ONNX Runtime on this CPU" if target.name == CPU else target.name
    return f"{name}{jetpack}{memory}"


def _rows(target: TargetPlan, unit: float) -> Iterator[tuple[str, ...]]:
    """Yield the rows of one target's table: a quantity, then its value for each Storage."""

    def sizes(name: str, values: list[int]) -> tuple[str, ...]:
        return (name, *(f"{value / unit:.2f}" for value in values))

    found = target.figures
    for part, name in _WEIGHTS.items():
        yield sizes(name, [f.weights[part] for f in found])
    yield sizes("text K/V, all sets", [f.memory.text_key_values for f in found])
    yield sizes("slow K/V", [f.memory.slow_key_values for f in found])
    if target.name == CPU:
        yield sizes("activations", [max(g.activations for g in f.memory.graphs) for f in found])
    else:
        yield sizes("activations *", [max(g.engine_activations for g in f.memory.graphs) for f in found])
        yield sizes("engine files *", [sum(g.engine for g in f.memory.graphs) for f in found])
    yield sizes("answering, peak", [f.memory.run for f in found])
    if target.name == CPU:
        yield sizes("loading, peak", [f.memory.build for f in found])
    elif target.jetpack:
        yield sizes("building, peak *", [f.memory.build for f in found])
    else:
        yield sizes("building, GPU", [f.memory.build_device for f in found])
        yield sizes("building, host *", [f.memory.build_host for f in found])
    yield ("fits", *(_fits(f) for f in found))
    speeds = [f.speed for f in found if f.speed is not None]
    if speeds:
        yield ("first answer, s", *(_seconds(s.first_token) for s in speeds))
        yield ("next question, s", *(_seconds(s.second_question) for s in speeds))
        yield ("tokens/s, plain graph", *(f"{s.plain_tokens_per_second:.1f}" for s in speeds))
        yield ("tokens/s, own kernels", *(f"{s.tokens_per_second:.1f}" for s in speeds))


def _lines(target: TargetPlan) -> Iterator[tuple[str, ...]]:
    """Yield a target's rows in the table of every target: one for each Storage."""
    for i, f in enumerate(target.figures):
        build = f.memory.build if target.jetpack else f.memory.build_device
        assert f.speed is not None, "plan --target all lists no CPU, the one target without a speed"
        yield (
            "" if i else target.name,
            f.storage.name,
            f"{f.memory.run / GB:.1f}",
            f"{build / GB:.1f}",
            _fits(f),
            _seconds(f.speed.first_token),
            _seconds(f.speed.second_question),
            f"{_rate(f.speed.plain_tokens_per_second)}-{_rate(f.speed.tokens_per_second)}",
        )


def _fits(figures: Figures) -> str:
    if figures.answers is None:
        return "?"
    if not figures.answers:
        return "no"
    return "yes" if figures.builds else "answers"


def _rate(value: float) -> str:
    return f"{value:.0f}" if value < 10_000 else f"{value / 1000:.0f}k"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def notes(plan: Plan) -> Iterator[str]:
    """Yield the paragraphs below the tables: the prompt, what was computed and what was assumed."""
    at, limits = plan.lengths, plan.limits
    yield (
        f"{at.frames} frames: {at.slow:,} slow tokens and a prompt of {at.prompt:,} ({at.before} before the video, "
        f"{at.fast:,} fast tokens, {at.question} of the question)."
    )
    if plan.targets[0].name == CPU:
        yield (
            "Nothing was run. The figures are the memory of one process that loads the graphs and answers a question. "
            "int4+...: a bundle in fp32 with rounded weights. fp16: computed in fp32, with fp32 weights in memory."
        )
        return
    yield (
        "Nothing was built or run. GB are 10^9 bytes, MB 10^6. On a Jetson, building and answering share the board's "
        f"memory with the system, for which {SYSTEM_BYTES / GB:.1f} GB are reserved. With other GPUs, building needs "
        "host memory too."
    )
    yield (
        f"Memory: for at most {limits.question_tokens} tokens of text in a prompt and {limits.new_tokens} of an "
        "answer. Fits 'answers': the engines run, but must be built with swap or on a larger board of the same kind."
    )
    yield (
        f"Measured: the ratios of engines, their activations and the host's copies of weights (rows with *) to what is "
        f"computed from the graphs, with the builder of {MEASURED_WITH}, not TensorRT; an engine is in memory twice "
        "while it is serialised. All else about memory is computed."
    )
    yield (
        "First answer: vision, slow K/V and prefill, without reading the video. '-': the table of targets has no fp32 "
        "rate. tokens/s is a range: others measured its lower end with a plain ONNX graph on an Orin Nano, its upper "
        "end with runtimes that have their own kernels. Launches and small kernels, which limit a fast GPU, are not "
        "counted."
    )
    for efficiency in dict.fromkeys(target.efficiency for target in plan.targets if target.efficiency is not None):
        names = [t.name for t in plan.targets if t.efficiency == efficiency]
        where = "" if len(plan.targets) == 1 else f" on {', '.join(names)}"
        yield (
            f"Assumed{where}: decoding at {efficiency.plain_bandwidth:.0%} of the bandwidth (plain ONNX graphs, such "
            f"as sfexport's) to {efficiency.bandwidth:.0%} ({efficiency.source}); prefill at "
            f"{efficiency.prefill:.0%} ({efficiency.prefill_int4:.0%} with int4) and vision at {efficiency.vision:.0%} "
            "of the fp16 rate."
        )
