"""Check one item of a Machine against a Target and give a DoctorCheck: the checks of `sfexport doctor`.

The operating system is not asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sfexport.kernels.launch_config import SMS
from sfexport.machines.machine import Machine
from sfexport.machines.targets import Target, kernel_ptx_isa, match_machine, newest_ptx_isa, oldest_cuda
from sfexport.versions import (
    CUDA_OF_TENSORRT_PACKAGE,
    NEW_NUMPY,
    NEWEST_TENSORRT,
    OLDEST,
    OLDEST_JETPACK,
    aot_needs_old_numpy,
    is_older,
    maps_weights,
    recommended_jetpacks,
    version_numbers,
    version_text,
)

OLDEST_SM = min(SMS)
# The released 8.5 B model in 10^9 bytes: its engines in fp16; its weights in float32.
ENGINES_GB, FLOAT32_GB = 15.9, 34.0
# Memory in 10^9 bytes to build its decoder in 16 bits: parser without, then with a mapped file (engines/memory.py).
JETSON_BUILD_GB, HOST_BUILD_GB = (58.2, 44.1), (43.1, 29.0)
OK, WARNING, MISSING = "ok", "warning", "missing"
APT_TENSORRT = "python3-libnvinfer python3-libnvinfer-dev tensorrt"
_NOT_NEEDED = "not needed to build or answer"


@dataclass(frozen=True)
class DoctorCheck:
    """One checked item of a machine.

    Attributes:
        name: the item, 'CUDA driver'.
        seen: what the machine has.
        expected: what engines need.
        verdict: 'ok', 'warning' or 'missing'.
        fix: a command or advice; empty: nothing to do.
    """

    name: str
    seen: str
    expected: str
    verdict: str = OK
    fix: str = ""


Check = Callable[[Machine, "Target | None"], "DoctorCheck | None"]


def checks_for(machine: Machine) -> tuple[Check, ...]:
    """List the checks for a machine, in the order to fix things in.

    Without NVIDIA hardware, TensorRT, its companions and the disk are not checked.
    """
    if not machine.cuda.device:
        return (_machine, _python, _gpu, _triton, _onnxruntime, _memory, _tensorrt_rtx, _torch)
    first = (_machine, _python, _jetpack, _driver, _gpu, _tensorrt, _numpy, _cuda_python, _triton)
    return (*first, _onnxruntime, _memory, _disk, _power, _polygraphy, _tensorrt_rtx, _torch)


def _machine(machine: Machine, target: Target | None) -> DoctorCheck:
    seen = machine.jetson_model or f"{machine.system} {machine.architecture}"
    here = match_machine(machine)
    if target is None:
        if not machine.cuda.device:
            return DoctorCheck("machine", seen, "any")
        fix = "This GPU is not in the table of targets: the checks below use general rules."
        return DoctorCheck("machine", seen, "a known target", WARNING, fix)
    if here and here.name == target.name:
        return DoctorCheck("machine", seen, target.name)
    name = here.name if here else f"not known as {target.name}"
    fix = f"This machine is {name}. Engines are tuned for the machine they are built on: build on {target.name}."
    return DoctorCheck("machine", seen, target.name, WARNING, fix)


def _python(machine: Machine, target: Target | None) -> DoctorCheck:
    """Check the version of Python: a JetPack's TensorRT bindings are compiled for its own Python only."""
    seen = machine.python + (" in a venv" if machine.in_venv else "")
    oldest = f"{version_text(OLDEST['python'])} or later"
    if is_older(machine.python, OLDEST["python"]):
        return DoctorCheck("Python", seen, oldest, MISSING, f"Install Python {oldest}.")
    if not (machine.jetson_model and target and target.jetpack):
        return DoctorCheck("Python", seen, oldest)
    expected = f"{target.python}, JetPack {target.jetpack}'s"
    imports_tensorrt = machine.tensorrt.module and not machine.tensorrt.error
    if imports_tensorrt or not _wrong_python(machine, target):
        return DoctorCheck("Python", seen, expected)
    return DoctorCheck("Python", seen, expected, WARNING, _new_venv())


def _wrong_python(machine: Machine, target: Target | None) -> bool:
    return target is not None and version_numbers(machine.python)[:2] != version_numbers(target.python)


def _new_venv() -> str:
    return "/usr/bin/python3 -m venv --system-site-packages ~/sfexport-venv, then install sfexport in it."


def _jetpack(machine: Machine, target: Target | None) -> DoctorCheck | None:
    if machine.jetson_model is None:
        return None
    oldest = f"{version_text(OLDEST_JETPACK)} or later"
    expected = target.jetpack if target and target.jetpack else oldest
    if machine.jetpack is None:
        fix = "Its version cannot be read here (normal in a container)."
        return DoctorCheck("JetPack", "unknown", expected, WARNING, fix)
    seen = machine.jetpack + (f" (Jetson Linux {machine.l4t})" if machine.l4t else "")
    if is_older(machine.jetpack, OLDEST_JETPACK):
        fix = f"Flash JetPack {recommended_jetpacks()}: TensorRT 8 is too old."
        return DoctorCheck("JetPack", seen, oldest, MISSING, fix)
    return DoctorCheck("JetPack", seen, expected)


def _driver(machine: Machine, target: Target | None) -> DoctorCheck:
    """Check that the CUDA driver takes the PTX that kernels are compiled to."""
    cuda, isa = machine.cuda, target.ptx_isa if target else kernel_ptx_isa(OLDEST_SM)
    expected = f"CUDA {oldest_cuda(isa)} or later"
    if cuda.cuda is None:
        seen = f"kernel module {cuda.driver}, no libcuda.so.1" if cuda.driver else "none"
        return DoctorCheck("CUDA driver", seen, expected, MISSING, _driver_fix(machine))
    seen = f"CUDA {cuda.cuda}" + (f", {cuda.driver}" if cuda.driver else "")
    if newest_ptx_isa(cuda.cuda) < isa:
        return DoctorCheck("CUDA driver", seen, expected, MISSING, _driver_fix(machine))
    return DoctorCheck("CUDA driver", seen, expected)


def _driver_fix(machine: Machine) -> str:
    if machine.jetson_model:
        flash = f"The driver is a part of JetPack: flash {recommended_jetpacks()}"
        return f"{flash}; in a container, start it with --runtime nvidia."
    return "sudo apt install nvidia-driver-580-server-open, then reboot; in a container, start it with --gpus all."


def _gpu(machine: Machine, target: Target | None) -> DoctorCheck:
    expected = f"compute capability {target.sm / 10:.1f}" if target else "compute capability 8.0 or later"
    if not machine.gpus:
        return DoctorCheck("GPU", machine.cuda.error or "none", expected, MISSING, _gpu_fix(machine, target))
    gpu = machine.gpus[0]
    seen = f"{gpu.name}, {gpu.sm / 10:.1f}, {gpu.multiprocessors} multiprocessors, {gpu.memory_gb:.0f} GB"
    if target and gpu.sm != target.sm:
        return DoctorCheck("GPU", seen, expected, MISSING, _build_there(target))
    if gpu.sm < OLDEST_SM:
        return DoctorCheck("GPU", seen, expected, MISSING, "This GPU is too old for sfexport's TensorRT engines.")
    return DoctorCheck("GPU", seen, expected)


def _gpu_fix(machine: Machine, target: Target | None) -> str:
    if machine.cuda.error == "cuInit answers 803":
        return "The driver's library and its kernel module are of different versions: reboot."
    if machine.cuda.error:
        return "The driver finds no GPU: check CUDA_VISIBLE_DEVICES, /dev/nvidia* and the output of sudo dmesg."
    return "Install the CUDA driver first." if machine.cuda.device else _build_there(target)


def _build_there(target: Target | None) -> str:
    name = target.name if target else "NAME"
    return f"Check here, then build on the target: sfexport build CHECKPOINT --target {name} --check"


def _tensorrt(machine: Machine, target: Target | None) -> DoctorCheck:
    found = machine.tensorrt
    expected = f"{version_text(OLDEST['tensorrt'])} to {version_text(NEWEST_TENSORRT)}"
    if target and target.jetpack:
        expected += f"; JetPack's is {target.tensorrt}"
    if not found.module:
        seen = f"{found.library}, but no module for this Python" if found.library else "none"
        return DoctorCheck("TensorRT", seen, expected, MISSING, _tensorrt_fix(machine, target))
    if found.error:
        return DoctorCheck(
            "TensorRT", f"{found.version or ''} {found.error}".strip(), expected, MISSING, _reinstall(machine)
        )
    seen = found.version or "unknown"
    if is_older(found.version, OLDEST["tensorrt"]):
        fix = f"Flash JetPack {recommended_jetpacks()}." if machine.jetson_model else _install_tensorrt(machine)
        return DoctorCheck("TensorRT", seen, expected, MISSING, fix)
    if found.cuda and found.cuda > _cuda_major(machine, target):
        seen = f"{seen} for CUDA {found.cuda}"
        return DoctorCheck(
            "TensorRT", seen, "a build for this driver's CUDA", MISSING, _replace_tensorrt(machine, found.cuda)
        )
    if version_numbers(found.version)[:2] > NEWEST_TENSORRT:
        return DoctorCheck("TensorRT", seen, expected, WARNING, "sfexport was not checked against a version this new.")
    return DoctorCheck("TensorRT", seen, expected)


def _tensorrt_fix(machine: Machine, target: Target | None) -> str:
    """Return the fix for a missing module `tensorrt`.

    On a Jetson it comes from apt, and a venv must see the system's packages.
    """
    found = machine.tensorrt
    if not machine.jetson_model:
        return _install_tensorrt(machine)
    if not found.library and not machine.jetpack_package:
        return "sudo apt update && sudo apt install nvidia-jetpack"
    if not found.library or not found.apt_bindings:
        return f"sudo apt install {APT_TENSORRT}"
    if _wrong_python(machine, target):
        return f"apt's module is not for Python {machine.python}: {_new_venv()}"
    if machine.in_venv and not machine.system_packages:
        reason = "Let this venv see apt's packages (its own packages are kept)"
        return f"{reason}: /usr/bin/python3 -m venv --system-site-packages {machine.prefix}"
    return _reinstall(machine)


def _cuda_major(machine: Machine, target: Target | None) -> int:
    oldest = target.cuda if target else oldest_cuda(kernel_ptx_isa(OLDEST_SM))
    return version_numbers(machine.cuda.cuda or oldest)[0]


def _install_tensorrt(machine: Machine) -> str:
    """Return the command that installs TensorRT for the driver's CUDA."""
    if machine.cuda.cuda and is_older(machine.cuda.cuda, CUDA_OF_TENSORRT_PACKAGE):
        triton, end = version_text(OLDEST["triton"]), CUDA_OF_TENSORRT_PACKAGE[0]
        return f"pip install tensorrt-cu12 'cuda-python<{end}' 'triton>={triton}'"
    return "pip install 'sfexport[tensorrt]'"


def _replace_tensorrt(machine: Machine, cuda: int) -> str:
    parts = f"tensorrt tensorrt-cu{cuda} tensorrt-cu{cuda}-libs tensorrt-cu{cuda}-bindings"
    return f"pip uninstall {parts}; {_install_tensorrt(machine)}"


def _reinstall(machine: Machine) -> str:
    if machine.jetson_model:
        return f"sudo apt install --reinstall {APT_TENSORRT}"
    return f"Reinstall it with its libraries: {_install_tensorrt(machine)}"


def _numpy(machine: Machine, target: Target | None) -> DoctorCheck | None:
    if not aot_needs_old_numpy(machine.tensorrt.version):
        return None
    seen, end = machine.packages["numpy"], version_text(NEW_NUMPY)
    expected = f"below {end} with this TensorRT"
    if version_numbers(seen) >= NEW_NUMPY:
        return DoctorCheck("numpy", seen or "", expected, WARNING, f"pip install 'numpy<{end}'")
    return DoctorCheck("numpy", seen or "none", expected)


def _cuda_python(machine: Machine, target: Target | None) -> DoctorCheck:
    seen = machine.packages["cuda-python"] or machine.packages["cuda-bindings"]
    major = _cuda_major(machine, target)
    oldest = version_text(OLDEST["cuda-python"])
    expected = f"{oldest} or later, at most {major}.x"
    if OLDEST["cuda-python"] <= version_numbers(seen) < (major + 1,):
        return DoctorCheck("cuda-python", seen or "", expected)
    return DoctorCheck(
        "cuda-python", seen or "none", expected, MISSING, f"pip install 'cuda-python>={oldest},<{major + 1}'"
    )


def _triton(machine: Machine, target: Target | None) -> DoctorCheck:
    seen, oldest = machine.packages["triton"], version_text(OLDEST["triton"])
    expected = f"{oldest} or later, to compile the kernel"
    if is_older(seen, OLDEST["triton"]):
        fix = f"pip install 'triton>={oldest}'" if seen else "pip install triton"
        return DoctorCheck("triton", seen or "none", expected, WARNING, fix)
    return DoctorCheck("triton", seen or "", expected)


def _polygraphy(machine: Machine, target: Target | None) -> DoctorCheck:
    return DoctorCheck("polygraphy", machine.packages["polygraphy"] or "none", _NOT_NEEDED)


def _tensorrt_rtx(machine: Machine, target: Target | None) -> DoctorCheck:
    """Show TensorRT for RTX, which builds engines for RTX cards without a GPU."""
    seen = machine.packages["tensorrt-rtx-cu12-bindings"] or "none"
    return DoctorCheck("tensorrt-rtx", seen, "not needed; builds for RTX cards")


def _torch(machine: Machine, target: Target | None) -> DoctorCheck:
    return DoctorCheck("torch", machine.packages["torch"] or "none", _NOT_NEEDED)


def _onnxruntime(machine: Machine, target: Target | None) -> DoctorCheck:
    expected = f"{version_text(OLDEST['onnxruntime'])} or later"
    package = "onnxruntime-gpu" if (machine.system, machine.architecture) == ("Linux", "x86_64") else "onnxruntime"
    if machine.providers is None:
        seen = f"{machine.onnxruntime}, which cannot be imported" if machine.onnxruntime else "none"
        return DoctorCheck("onnxruntime", seen, expected, MISSING, f"pip install --force-reinstall {package}")
    if machine.onnxruntime and is_older(machine.onnxruntime, OLDEST["onnxruntime"]):
        return DoctorCheck("onnxruntime", machine.onnxruntime, expected, MISSING, f"pip install --upgrade {package}")
    cuda = machine.gpus and "CUDAExecutionProvider" in machine.providers
    seen = f"{machine.onnxruntime or 'unknown'}, on the {'GPU' if cuda else 'CPU'}"
    return DoctorCheck("onnxruntime", seen, expected)


def _memory(machine: Machine, target: Target | None) -> DoctorCheck:
    """Check memory and swap for a build; without NVIDIA hardware, for float32 weights in ONNX Runtime."""
    if not machine.cuda.device:
        needed, expected = FLOAT32_GB, f"{FLOAT32_GB:.0f} GB to run the 8.5 B model in float32 (computed)"
    else:
        mapped = target is not None and maps_weights(target.tensorrt)
        # A Jetson's CPU and GPU share one memory.
        sizes = JETSON_BUILD_GB if machine.jetson_model else HOST_BUILD_GB
        needed = sizes[mapped]
        expected = f"{needed:.0f} GB to build the 8.5 B model in 16 bits (estimated)"
    if machine.memory_gb is None:
        return DoctorCheck("memory", "unknown", expected)
    free, swap = machine.memory_available_gb or 0.0, machine.swap_gb or 0.0
    seen = f"{machine.memory_gb:.1f} GB, {free:.1f} free, {swap:.1f} swap"
    if machine.memory_gb + swap >= needed:
        return DoctorCheck("memory", seen, expected)
    return DoctorCheck("memory", seen, expected, WARNING, "Use a smaller model, or add memory or swap.")


def _disk(machine: Machine, target: Target | None) -> DoctorCheck:
    expected = f"{ENGINES_GB:.0f} GB for the 8.5 B model's engines in fp16 (computed)"
    if machine.disk_free_gb is None:
        return DoctorCheck("disk", "unknown", expected)
    seen = f"{machine.disk_free_gb:.1f} GB free here"
    if machine.disk_free_gb >= ENGINES_GB:
        return DoctorCheck("disk", seen, expected)
    return DoctorCheck("disk", seen, expected, WARNING, "Write the engines to another disk with -o.")


def _power(machine: Machine, target: Target | None) -> DoctorCheck | None:
    """Check that a Jetson is in its fastest power mode.

    Slower modes lower clocks and switch multiprocessors off, and TensorRT tunes for the mode that it is built in.
    """
    if machine.jetson_model is None:
        return None
    best = next((name for name in ("MAXN_SUPER", "MAXN") if name in machine.power_modes), None)
    expected = best or "the fastest"
    if machine.power_mode is None:
        return DoctorCheck("power mode", "unknown", expected, WARNING, "sudo nvpmodel -q")
    if best is None or machine.power_mode == best:
        return DoctorCheck("power mode", machine.power_mode, expected)
    return DoctorCheck(
        "power mode", machine.power_mode, expected, WARNING, f"sudo nvpmodel -m {machine.power_modes[best]}"
    )
