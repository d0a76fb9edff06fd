"""Detect this machine as one Machine: system, Python, GPUs, driver, TensorRT, JetPack, memory.

All facts come through a Probe. Of heavy libraries, this process loads libcuda and ONNX Runtime only.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sfexport.machines.probe import Probe
from sfexport.versions import jetpack_of_l4t

PACKAGES = ("numpy", "triton", "cuda-python", "cuda-bindings", "polygraphy", "torch", "tensorrt-rtx-cu12-bindings")
TENSORRT_PACKAGES = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu13-bindings", "tensorrt-cu12-bindings")
APT_PACKAGES = ("nvidia-jetpack", "libnvinfer10", "libnvinfer11", "libnvinfer8", "python3-libnvinfer")
_NVIDIA = "0x10de"
# Numbers of device attributes (CUdevice_attribute in cuda.h).
_MULTIPROCESSORS, _MAJOR, _MINOR = 16, 75, 76


@dataclass(frozen=True)
class Gpu:
    """One CUDA device.

    Attributes:
        name: as the driver names it.
        sm: compute capability times ten.
        multiprocessors: number of multiprocessors that are switched on.
        memory_gb: memory in 10^9 bytes.
    """

    name: str
    sm: int
    multiprocessors: int
    memory_gb: float


@dataclass(frozen=True)
class Cuda:
    """NVIDIA hardware and driver of a machine.

    Attributes:
        device: NVIDIA hardware or its device nodes exist, with a driver or without.
        driver: version of the kernel module, '580.65.06'; None: unknown.
        cuda: newest CUDA version that libcuda supports, '13.0'; None: no libcuda, or it did not tell.
        gpus: CUDA devices, in the driver's order.
        error: the failed libcuda call and its code; None: no call failed.
    """

    device: bool
    driver: str | None
    cuda: str | None
    gpus: tuple[Gpu, ...]
    error: str | None


@dataclass(frozen=True)
class TensorRT:
    """Installed parts of TensorRT.

    Attributes:
        module: Python finds the module `tensorrt`.
        version: of the module, imported in a process of its own, else of its pip package; None: unknown.
        error: why the import failed; None: it did not fail or was not tried.
        cuda: major version of CUDA that the pip package is for; None: its name has no CUDA version, or not from pip.
        library: 'libnvinfer.so.10', or name and version of the apt package that holds it; None: not found.
        apt_bindings: version of the apt package python3-libnvinfer; None: not installed.
    """

    module: bool
    version: str | None
    error: str | None
    cuda: int | None
    library: str | None
    apt_bindings: str | None


@dataclass(frozen=True)
class Machine:
    """One machine's hardware and software.

    Attributes:
        system: operating system, 'Linux'.
        architecture: 'x86_64', 'aarch64'.
        python: version of the running Python.
        prefix: directory of its environment.
        in_venv: it runs in a venv.
        system_packages: it sees the system's Python packages.
        cuda: NVIDIA hardware and driver.
        tensorrt: installed parts of TensorRT.
        onnxruntime: version of ONNX Runtime; None: not installed.
        providers: ONNX Runtime's execution providers; None: it cannot be imported.
        packages: version of each of PACKAGES; None: not installed.
        jetson_model: as the device tree names the board; None: not a Jetson.
        jetpack: version of JetPack, '6.2'; None: unknown, or not a Jetson.
        l4t: version of Jetson Linux, '36.4.3'; None: unknown.
        jetpack_package: the meta package nvidia-jetpack is installed.
        power_mode: as nvpmodel names it; None: unknown, or not a Jetson.
        power_modes: number of each power mode by name.
        memory_gb: memory in 10^9 bytes; None: unknown.
        memory_available_gb: memory available to new processes in 10^9 bytes; None: unknown.
        swap_gb: swap space in 10^9 bytes; None: unknown.
        disk_free_gb: free space of the current directory's file system in 10^9 bytes; None: unknown.
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
    """Detect this machine, or the one that a probe describes.

    Raises nothing. It usually takes a second or two, since TensorRT is imported in another process.
    """
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
    """Check whether a venv was made with --system-site-packages."""
    text = probe.read_text(f"{prefix}/pyvenv.cfg") or ""
    return re.search(r"^include-system-site-packages\s*=\s*true", text, re.MULTILINE | re.IGNORECASE) is not None


def _apt_versions(probe: Probe) -> dict[str, str]:
    """Return the versions of the installed APT_PACKAGES; dpkg-query's error for the others is ignored."""
    form = "${db:Status-Abbrev} ${Package} ${Version}\n"
    output = probe.run("dpkg-query", "--show", f"--showformat={form}", *APT_PACKAGES)
    rows = (line.split() for line in output.stdout.splitlines()) if output else ()
    return {row[1]: row[2] for row in rows if len(row) == 3 and row[0].startswith("ii")}


def _memory(probe: Probe) -> dict[str, float]:
    """Read the sizes in /proc/meminfo, converted from KiB to 10^9 bytes."""
    text = probe.read_text("/proc/meminfo") or ""
    return {name: int(kib) * 1024 / 1e9 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}


def _jetson_model(probe: Probe) -> str | None:
    model = probe.read_text("/proc/device-tree/model") or ""
    return model if "Jetson" in model else None


def _l4t(probe: Probe) -> str | None:
    """Read the version of Jetson Linux: '# R36 (release), REVISION: 4.3, ...' -> '36.4.3'."""
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", probe.read_text("/etc/nv_tegra_release") or "")
    return f"{found[1]}.{found[2]}" if found else None


def _jetpack(package: str | None, l4t: str | None) -> str | None:
    """Derive JetPack's version from its meta package's ('6.2.1+b38'), else from Jetson Linux's."""
    if package:
        number = re.match(r"[\d.]+", package)
        return (number[0].rstrip(".") or None) if number else None
    return None if l4t is None else jetpack_of_l4t(l4t)


def _power_mode(probe: Probe) -> str | None:
    """Ask nvpmodel for the power mode: 'NV Power Mode: MAXN_SUPER' -> 'MAXN_SUPER'."""
    output = probe.run("nvpmodel", "-q")
    found = re.search(r"NV Power Mode:\s*(\S+)", output.stdout) if output else None
    return found[1] if found else None


def _power_modes(probe: Probe) -> dict[str, int]:
    """Read the number of each power mode by name.

    Numbers differ between boards: MAXN_SUPER is 0 on an Orin NX and 2 on an Orin Nano.
    """
    text = probe.read_text("/etc/nvpmodel.conf") or ""
    return {name: int(number) for number, name in re.findall(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", text)}


def _tensorrt(probe: Probe, apt: Mapping[str, str]) -> TensorRT:
    found = {name: version for name in TENSORRT_PACKAGES if (version := probe.package(name))}
    version = next(iter(found.values()), None)
    cuda = next((major for major in (13, 12) if any(f"cu{major}" in name for name in found)), None)
    module, error = probe.has_module("tensorrt"), None
    if module:
        # Imported in another process: libraries that are missing or do not fit can end the importing process.
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
    device = jetson or nodes or bool(text) or _has_nvidia_pci_device(probe)
    driver = found[0] if found else None
    library = probe.load_library("libcuda.so.1")
    if library is None:
        return Cuda(device, driver, None, (), None)
    try:
        version, gpus = _ask_driver(library)
    except _DriverError as error:
        return Cuda(device, driver, error.version, (), str(error))
    return Cuda(device or bool(gpus), driver, version, gpus, None)


def _has_nvidia_pci_device(probe: Probe) -> bool:
    """Check whether PCI has a display or compute device (class 03) of NVIDIA, with a driver or without."""
    root = "/sys/bus/pci/devices"
    return any(
        probe.read_text(f"{root}/{name}/vendor") == _NVIDIA
        and (probe.read_text(f"{root}/{name}/class") or "").startswith("0x03")
        for name in probe.names(root)
    )


class _DriverError(Exception):
    """A failed libcuda call; `version`: the CUDA version, if it was known by then."""

    def __init__(self, message: str, version: str | None) -> None:
        super().__init__(message)
        self.version = version


def _ask_driver(library: Any) -> tuple[str, tuple[Gpu, ...]]:
    """Ask libcuda's C interface for its CUDA version and the devices.

    Raises:
        _DriverError: a call returned an error code.
    """
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

    found = asked("cuDriverGetVersion")  # allowed before cuInit
    version = f"{found // 1000}.{found % 1000 // 10}"
    call("cuInit", 0)
    return version, tuple(gpu(index) for index in range(asked("cuDeviceGetCount")))
