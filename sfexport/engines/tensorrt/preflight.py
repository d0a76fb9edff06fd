"""Check a build for a target without the target: `sfexport build --check`.

Each graph's nodes, types and opset against that TensorRT's parser; the kernels, compiled for its SM; every tensor's
shapes; memory. Needs no GPU and no TensorRT.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sfexport.artifacts.atomic import new_directory
from sfexport.artifacts.bundle import Bundle
from sfexport.artifacts.manifest_files import describe_files, write_manifest
from sfexport.engines.memory import MEASURED_WITH, MemoryEstimate, estimate_memory, with_decoder_parts
from sfexport.engines.profiles import Limits, Profile, resolve_profiles
from sfexport.engines.tensorrt.build import TensorRTOptions, memory_needs, plugin_settings
from sfexport.engines.tensorrt.graph_file import EngineGraph, engine_graphs
from sfexport.engines.tensorrt.parser_support import ParserSupport, check_graph, support_for
from sfexport.errors import InputError, MissingDependency, SfexportError
from sfexport.graphs.plugin_nodes import PLUGIN_OPS, with_plugin_nodes
from sfexport.kernels.compile import SHARED_LIMIT, Kernel, assemble, find_ptxas
from sfexport.kernels.store import save_kernels
from sfexport.machines.targets import Target, kernel_ptx_isa, newest_ptx_isa
from sfexport.versions import NEW_NUMPY, aot_needs_old_numpy, has_aot_plugins, maps_weights, version_text

BUILD_FILE = "check.json"


@dataclass(frozen=True)
class PreflightCheck:
    """One thing checked. `passed` None: it could not be checked here, and `found` says why."""

    subject: str
    checked: str
    found: str
    passed: bool | None

    @property
    def verdict(self) -> str:
        return {True: "ok", False: "GAP", None: "not checked"}[self.passed]


@dataclass(frozen=True)
class Readiness:
    """The verdict on a build. `kernels` are compiled; `profiles` and `memory` are as a build would use them."""

    target: Target
    limits: Limits
    precision: str
    quantize: str | None
    lm_head: str | None
    split_decoder: int
    checks: tuple[PreflightCheck, ...]
    profiles: dict[str, list[Profile]]
    memory: MemoryEstimate
    kernels: tuple[Kernel, ...] = field(repr=False)

    @property
    def passed(self) -> bool:
        return all(check.passed is not False for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        kernels = [{k: v for k, v in asdict(kernel).items() if k != "ptx"} for kernel in self.kernels]
        return {
            "passed": self.passed,
            "target": asdict(self.target),
            "limits": asdict(self.limits),
            "precision": self.precision,
            "quantize": self.quantize,
            "lm_head": self.lm_head,
            "split_decoder": self.split_decoder,
            "checks": [asdict(check) | {"verdict": check.verdict} for check in self.checks],
            "profiles": {g: [asdict(p) for p in profiles] for g, profiles in self.profiles.items()},
            "memory": self.memory.to_json(),
            "kernels": kernels,
        }

    def rows(self) -> list[tuple[str, str, str, str]]:
        return [(check.subject, check.checked, check.found, check.verdict) for check in self.checks]


def check_build(bundle: Bundle, target: Target, options: TensorRTOptions) -> Readiness:
    """Check a build of `bundle` for `target`.

    Raises:
        InputError: limits without meaning, a directory that holds no kernels, a TensorRT older than 10.3.
    """
    limits = options.limits(bundle)
    profiles = resolve_profiles(bundle, limits)
    support, parts = support_for(target.tensorrt), options.decoder_parts(bundle)
    kernel_checks, kernels = _check_kernels(bundle, target, options)
    mapped = maps_weights(target.tensorrt)
    memory = estimate_memory(bundle, profiles, mapped, plugin=bool(kernels))
    memory = with_decoder_parts(memory, parts, mapped)
    checks = [
        _check_precision(bundle, target),
        *_check_graphs(bundle, target, support, engine_graphs(bundle, profiles, parts), plugin=bool(kernels)),
        *kernel_checks,
        *_check_profiles(profiles),
        *_check_memory(memory, target),
    ]
    return Readiness(
        target=target,
        limits=limits,
        precision=bundle.precision,
        quantize=bundle.content["options"].get("quantize"),
        lm_head=bundle.quantization["lm_head"] if bundle.quantization else None,
        split_decoder=parts,
        checks=tuple(checks),
        profiles=profiles,
        memory=memory,
        kernels=kernels,
    )


def _check_precision(bundle: Bundle, target: Target) -> PreflightCheck:
    wanted = [bundle.precision, *(["int4"] if bundle.quantization else [])]
    passed = set(wanted) <= set(target.precisions)
    return PreflightCheck("precision", f"{target.name} computes in it", " with ".join(wanted), passed)


def _check_graphs(
    bundle: Bundle, target: Target, support: ParserSupport, graphs: Iterable[EngineGraph], plugin: bool
) -> Iterator[PreflightCheck]:
    for graph in graphs:
        name, model = graph.name, graph.model
        if plugin:
            model = with_plugin_nodes(model, plugin_settings(bundle, target.sm, target.multiprocessors))
        gaps = check_graph(model, name, support, PLUGIN_OPS, bundle.weights_directory)
        checked = f"nodes, types and opset against TensorRT {target.tensorrt}"
        opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
        if not gaps:
            yield PreflightCheck(
                name, checked, f"{len(model.graph.node)} nodes, opset {opset} of {support.opset}", True
            )
        for gap in gaps:
            yield PreflightCheck(name, checked, str(gap), False)


def _check_kernels(
    bundle: Bundle, target: Target, options: TensorRTOptions
) -> tuple[list[PreflightCheck], tuple[Kernel, ...]]:
    if not bundle.config.slow_fast.hybrid_layers:
        return [], ()
    isa = kernel_ptx_isa(target.sm)
    checked = f"compiles for SM {target.sm / 10:.1f}, PTX {isa / 10:.1f}"
    source = options.kernel_source()
    try:
        kernels = source(bundle.precision, bundle.config.text.head_dim, target.sm, isa)
    except (MissingDependency, InputError) as error:
        if isinstance(error, InputError) and options.kernels is not None:
            return [PreflightCheck("plugin kernels", checked, error.paragraph(), False)], ()
        return [PreflightCheck("plugin kernels", checked, error.paragraph(), None)], ()
    except SfexportError as error:
        return [PreflightCheck("plugin kernels", checked, error.paragraph(), False)], ()
    newest = newest_ptx_isa(target.cuda)
    takes = f"driver of CUDA {target.cuda} takes PTX {newest / 10:.1f}"
    checks = [PreflightCheck("plugin kernels", takes, f"PTX {isa / 10:.1f}", isa <= newest)]
    checks += [_kernel_check(kernel, checked) for kernel in kernels]
    plugin = "ahead of time" if has_aot_plugins(target.tensorrt) else "Python"
    if aot_needs_old_numpy(target.tensorrt):
        plugin += f" with NumPy before {version_text(NEW_NUMPY)}, else Python"
    checks.append(PreflightCheck("plugin", f"kind for TensorRT {target.tensorrt}", plugin, True))
    return checks, kernels


def _kernel_check(kernel: Kernel, checked: str) -> PreflightCheck:
    ptxas = find_ptxas(kernel.sm)
    if ptxas is None:
        return PreflightCheck(
            kernel.name, checked, f"{kernel.shared} bytes of shared memory; no ptxas here to assemble it", None
        )
    try:
        used = assemble(kernel, ptxas)
    except SfexportError as error:
        return PreflightCheck(kernel.name, checked, error.paragraph(), False)
    shared = kernel.shared + used.static_shared
    found = f"{used.registers} registers, {shared / 1024:.1f} KB shared, {used.spill_stores} bytes spilled"
    return PreflightCheck(kernel.name, checked, found, shared <= SHARED_LIMIT)


def _check_profiles(profiles: dict[str, list[Profile]]) -> Iterator[PreflightCheck]:
    for graph, by_name in profiles.items():
        for profile in by_name:
            ordered = all(a <= b <= c for t in profile.tensors for a, b, c in zip(t.min, t.opt, t.max, strict=True))
            first = profile.tensors[0]
            found = f"{len(profile.tensors)} tensors; {first.name} {list(first.min)} to {list(first.max)}"
            yield PreflightCheck(graph, f"shapes of profile {profile.name}", found, ordered)


def _check_memory(memory: MemoryEstimate, target: Target) -> Iterator[PreflightCheck]:
    device, host = target.memory_gb, target.memory_gb if target.shared_memory else None
    engines = sum(graph.engine for graph in memory.graphs) / 1e9
    found = (
        f"engines about {engines:.1f} GB; their size, activations and the host's copies of weights: ratios measured "
        f"with {MEASURED_WITH}, not TensorRT; weights and K/V: computed"
    )
    yield PreflightCheck("memory", "source of the estimates", found, None)
    for what, needs, has in memory_needs(memory, target.shared_memory, device, host):
        if has is None:
            yield PreflightCheck(
                "memory", f"{what} fits", f"about {needs:.1f} GB (estimated); the host's memory is not known", None
            )
        else:
            yield PreflightCheck(
                "memory", f"{what} fits", f"about {needs:.1f} GB of {has:g} GB (estimated)", needs <= has
            )


def write_build_directory(readiness: Readiness, out: Path) -> None:
    """Write a directory for the device: kernels, a script that builds there, and a page that says how.

    Raises:
        InputError: the output cannot be written or holds something else.
    """
    with new_directory(out, BUILD_FILE) as directory:
        names = [*save_kernels(directory, readiness.kernels), "build.sh", "README.md"]
        script = directory / "build.sh"
        script.write_text(_script(readiness))
        script.chmod(0o755)
        (directory / "README.md").write_text(_page(readiness))
        write_manifest(directory / BUILD_FILE, readiness.to_json() | {"files": describe_files(directory, names)})


def _script(readiness: Readiness) -> str:
    limits, target = readiness.limits, readiness.target
    jetpack = f" --jetpack {target.jetpack}" if target.jetpack else ""
    kernels = ' --kernels "$here"' if readiness.kernels else ""
    rounded = f" --quantize {readiness.quantize} --lm-head {readiness.lm_head}" if readiness.quantize else ""
    return f"""#!/bin/sh
# Builds TensorRT engines for {target.name} on the machine itself: ./build.sh CHECKPOINT [ENGINES]
set -eu
here=$(cd "$(dirname "$0")" && pwd)
checkpoint=${{1:?usage: ./build.sh CHECKPOINT [ENGINES]}}
sfexport doctor --target {target.name}
sfexport build "$checkpoint" -o "${{2:-engines}}" --backend tensorrt --target {target.name}{jetpack} \\
    --precision {readiness.precision} --frames {limits.frames} --max-question-tokens {limits.question_tokens} \\
    --max-new-tokens {limits.new_tokens} --max-batch {limits.rows} \\
    --split-decoder {readiness.split_decoder}{rounded}{kernels}
"""


def _page(readiness: Readiness) -> str:
    target = readiness.target
    system = f"JetPack {target.jetpack}" if target.jetpack else f"CUDA {target.cuda}"
    lines = "\n".join(f"| {' | '.join(c.replace('|', '/') for c in row)} |" for row in readiness.rows())
    return f"""# Building engines for {target.name}

Checked for {system} and TensorRT {target.tensorrt}, without the machine. On the machine, with sfexport installed and
this directory and the checkpoint copied there:

    ./build.sh CHECKPOINT engines
    sfexport ask engines video.mp4 -q "What happens in the video?"

The kernels here are compiled, so that the machine needs no Triton.

| what | checked | found | verdict |
|---|---|---|---|
{lines}
"""
