"""What can be found out about this machine without loading a heavy library: one record, `detect_machine()`.

Everything comes through a Probe.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sfexport.machines.probe import Probe
from sfexport.versions import jetpack_of_l4t

PACKAGES = ("numpy", "triton", "cuda-python", "cuda-bindings", "polygraphy", "torch")
TENSORRT_PACKAGES = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu13-bindings", "tensorrt-cu12-bindings")
APT_PACKAGES = ("nvidia-jetpack", "libnvinfer10", "libnvinfer11", "libnvinfer8", "python3-libnvinfer")
_NVIDIA = "0x10de"
# Attributes of a device, as numbered in cuda.h.
_MULTIPROCESSORS, _MAJOR, _MINOR = 16, 75, 76


@dataclass(frozen=True)
class Gpu:
    """One CUDA device: name, compute capability times ten, multiprocessors switched on, memory in 10^9 bytes."""

    name: str
    sm: int
    multiprocessors: int
    memory_gb: float


@dataclass(frozen=True)
class Cuda:
    """What the NVIDIA driver says.

    Attributes:
        device: NVIDIA hardware or its device nodes are there, driver or not.
        driver: version of the kernel module, '580.65.06'.
        cuda: newest CUDA version that libcuda supports, '13.0'; None where there is no libcuda.
        error: what libcuda answered instead of its devices.
    """

    device: bool
    driver: str | None
    cuda: str | None
    gpus: tuple[Gpu, ...]
    error: str | None


@dataclass(frozen=True)
class TensorRT:
    """What there is of TensorRT.

    Attributes:
        module: Python finds the module `tensorrt`.
        version: of the module, as imported (in a process of its own), else as its package says.
        error: why the import failed.
        cuda: major version of CUDA that a pip package of it is for; None: not from pip.
        library: 'libnvinfer.so.10', or the apt package that holds it.
        apt_bindings: version of the apt package python3-libnvinfer.
    """

    module: bool
    version: str | None
    error: str | None
    cuda: int | None
    library: str | None
    apt_bindings: str | None


@dataclass(frozen=True)
class Machine:
    """Sizes are in 10^9 bytes; None: unknown.

    Attributes:
        python, prefix, in_venv, system_packages: the interpreter; whether its venv sees the system's packages.
        jetson_model: as the device tree names the board; None: not a Jetson.
        jetpack, l4t: '6.2' and '36.4.3'. jetpack_package: the meta package nvidia-jetpack is installed.
        power_mode: as nvpmodel names it. power_modes: number by name.
        onnxruntime: version; None: not installed. providers: None: it cannot be imported.
        packages: version of each of PACKAGES.
    """

    system: str
    architecture: str
    python: str
    prefix: str
    in_venv: bool
    system_packages: bool
    cuda: Cuda
    tensorrt: TensorRT
    onnxruntime: str | None
    providers: tuple[str, ...] | None
    packages: Mapping[str, str | None]
    jetson_model: str | None
    jetpack: str | None
    l4t: str | None
    jetpack_package: bool
    power_mode: str | None
    power_modes: Mapping[str, int]
    memory_gb: float | None
    memory_available_gb: float | None
    swap_gb: float | None
    disk_free_gb: float | None

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        return self.cuda.gpus


def detect_machine(probe: Probe | None = None) -> Machine:
    """Examine this machine, or the one a probe describes. Raises nothing; takes a second or two."""
    probe = probe or Probe()
    interpreter, (system, architecture) = probe.interpreter(), probe.system()
    in_venv = interpreter.prefix != interpreter.base_prefix
    apt, memory, free = _apt_versions(probe), _memory(probe), probe.disk_free()
    jetson_model = _jetson_model(probe)
    l4t = _l4t(probe)
    providers = probe.onnxruntime_providers()
    return Machine(
        system=system,
        architecture=architecture,
        python=interpreter.version,
        prefix=interpreter.prefix,
        in_venv=in_venv,
        system_packages=not in_venv or _venv_sees_system(probe, interpreter.prefix),
        cuda=_cuda(probe, jetson_model is not None),
        tensorrt=_tensorrt(probe, apt),
        onnxruntime=probe.package("onnxruntime-gpu") or probe.package("onnxruntime"),
        providers=None if providers is None else tuple(providers),
        packages={name: probe.package(name) for name in PACKAGES},
        jetson_model=jetson_model,
        jetpack=_jetpack(apt.get("nvidia-jetpack"), l4t) if jetson_model else None,
        l4t=l4t,
        jetpack_package="nvidia-jetpack" in apt,
        power_mode=_power_mode(probe) if jetson_model else None,
        power_modes=_power_modes(probe) if jetson_model else {},
        memory_gb=memory.get("MemTotal"),
        memory_available_gb=memory.get("MemAvailable"),
        swap_gb=memory.get("SwapTotal"),
        disk_free_gb=None if free is None else free / 1e9,
    )


def _venv_sees_system(probe: Probe, prefix: str) -> bool:
    text = probe.read_text(f"{prefix}/pyvenv.cfg") or ""
    return re.search(r"^include-system-site-packages\s*=\s*true", text, re.MULTILINE | re.IGNORECASE) is not None


def _apt_versions(probe: Probe) -> dict[str, str]:
    """Installed Debian packages of APT_PACKAGES; dpkg-query fails for the others, which does not matter."""
    form = "${db:Status-Abbrev} ${Package} ${Version}\n"
    output = probe.run("dpkg-query", "--show", f"--showformat={form}", *APT_PACKAGES)
    rows = (line.split() for line in output.stdout.splitlines()) if output else ()
    return {row[1]: row[2] for row in rows if len(row) == 3 and row[0].startswith("ii")}


def _memory(probe: Probe) -> dict[str, float]:
    """/proc/meminfo counts in KiB."""
    text = probe.read_text("/proc/meminfo") or ""
    return {name: int(kib) * 1024 / 1e9 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}


def _jetson_model(probe: Probe) -> str | None:
    model = probe.read_text("/proc/device-tree/model") or ""
    return model if "Jetson" in model else None


def _l4t(probe: Probe) -> str | None:
    """'# R36 (release), REVISION: 4.3, ...' -> '36.4.3'."""
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", probe.read_text("/etc/nv_tegra_release") or "")
    return f"{found[1]}.{found[2]}" if found else None


def _jetpack(package: str | None, l4t: str | None) -> str | None:
    """From the meta package's version ('6.2.1+b38'), else from the Jetson Linux under it."""
    if package:
        number = re.match(r"[\d.]+", package)
        return (number[0].rstrip(".") or None) if number else None
    return None if l4t is None else jetpack_of_l4t(l4t)


def _power_mode(probe: Probe) -> str | None:
    """'NV Power Mode: MAXN_SUPER' -> 'MAXN_SUPER'."""
    output = probe.run("nvpmodel", "-q")
    found = re.search(r"NV Power Mode:\s*(\S+)", output.stdout) if output else None
    return found[1] if found else None


def _power_modes(probe: Probe) -> dict[str, int]:
    """Numbers differ between boards: MAXN_SUPER is 0 on an Orin NX and 2 on an Orin Nano."""
    text = probe.read_text("/etc/nvpmodel.conf") or ""
    return {name: int(number) for number, name in re.findall(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", text)}


def _tensorrt(probe: Probe, apt: Mapping[str, str]) -> TensorRT:
    found = {name: version for name in TENSORRT_PACKAGES if (version := probe.package(name))}
    version = next(iter(found.values()), None)
    cuda = next((major for major in (13, 12) if any(f"cu{major}" in name for name in found)), None)
    module, error = probe.has_module("tensorrt"), None
    if module:
        # In a process of its own: a module whose libraries are missing or do not fit can end the process.
        output = probe.run(probe.interpreter().executable, "-c", "import tensorrt; print(tensorrt.__version__)")
        if output and output.code == 0:
            printed = output.stdout.split()
            version = printed[-1] if printed else version
        else:
            error = _last_line(output.stderr) if output else "the import does not end"
    in_apt = next((f"{name} {apt[name]}" for name in APT_PACKAGES if name.startswith("libnv") and name in apt), None)
    library = probe.find_library("nvinfer") or in_apt
    return TensorRT(module, version, error, cuda, library, apt.get("python3-libnvinfer"))


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["the import ends the process"])[-1]


def _cuda(probe: Probe, jetson: bool) -> Cuda:
    text = probe.read_text("/proc/driver/nvidia/version") or ""
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text)
    nodes = any(probe.exists(path) for path in ("/dev/nvhost-gpu", "/dev/nvidia0", "/dev/nvidiactl"))
    device = jetson or nodes or bool(text) or _on_the_bus(probe)
    driver = found[0] if found else None
    library = probe.load_library("libcuda.so.1")
    if library is None:
        return Cuda(device, driver, None, (), None)
    try:
        version, gpus = _ask_driver(library)
    except _DriverError as error:
        return Cuda(device, driver, error.version, (), str(error))
    return Cuda(device or bool(gpus), driver, version, gpus, None)


def _on_the_bus(probe: Probe) -> bool:
    """A display or compute device of NVIDIA's (class 03) on PCI, whether it has a driver or not."""
    root = "/sys/bus/pci/devices"
    return any(
        probe.read_text(f"{root}/{name}/vendor") == _NVIDIA
        and (probe.read_text(f"{root}/{name}/class") or "").startswith("0x03")
        for name in probe.names(root)
    )


class _DriverError(Exception):
    def __init__(self, message: str, version: str | None) -> None:
        super().__init__(message)
        self.version = version


def _ask_driver(library: Any) -> tuple[str, tuple[Gpu, ...]]:
    """CUDA version and devices, through libcuda's C interface; every call's result is looked at."""
    version = None

    def call(name: str, *arguments: Any) -> None:
        code = getattr(library, name)(*arguments)
        if code:
            raise _DriverError(f"{name} answers {code}", version)

    number = ctypes.c_int()

    def asked(name: str, *arguments: Any) -> int:
        call(name, ctypes.byref(number), *arguments)
        return number.value

    def gpu(index: int) -> Gpu:
        device, name, size = asked("cuDeviceGet", index), ctypes.create_string_buffer(256), ctypes.c_size_t()
        call("cuDeviceGetName", name, len(name), device)
        call("cuDeviceTotalMem_v2", ctypes.byref(size), device)
        major, minor, multiprocessors = (
            asked("cuDeviceGetAttribute", key, device) for key in (_MAJOR, _MINOR, _MULTIPROCESSORS)
        )
        return Gpu(name.value.decode(errors="replace"), 10 * major + minor, multiprocessors, size.value / 1e9)

    found = asked("cuDriverGetVersion")  # may be asked before cuInit
    version = f"{found // 1000}.{found % 1000 // 10}"
    call("cuInit", 0)
    return version, tuple(gpu(index) for index in range(asked("cuDeviceGetCount")))
