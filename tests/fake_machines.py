"""Machines as `sfexport doctor` would find them, described for a probe; no hardware is needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sfexport.machines.probe import Interpreter, Output, Probe

MEMORY = "MemTotal: {total} kB\nMemFree: 1000 kB\nMemAvailable: {free} kB\nSwapTotal: {swap} kB\n"
POWER_QUERY = ("nvpmodel", "-q")
SYSTEM_PYTHON = Interpreter("3.10.12", "/usr/bin/python3", "/usr", "/usr")
IMPORT = "import tensorrt; print(tensorrt.__version__)"


@dataclass(frozen=True)
class Device:
    """What a fake libcuda says of one GPU."""

    name: str
    major: int
    minor: int
    multiprocessors: int
    memory: int  # bytes


@dataclass(frozen=True)
class FakeCuda:
    """libcuda.so.1 as seen through ctypes. `fails` maps a function's name to the error code it answers."""

    version: int  # 12060 for 12.6
    devices: tuple[Device, ...]
    fails: Mapping[str, int] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.fails.get(name) or getattr(self, f"_{name}")(*arguments)

    def _cuDriverGetVersion(self, out: Any) -> int:
        return _store(out, self.version)

    def _cuInit(self, flags: int) -> int:
        return 0

    def _cuDeviceGetCount(self, out: Any) -> int:
        return _store(out, len(self.devices))

    def _cuDeviceGet(self, out: Any, index: int) -> int:
        return _store(out, 40 + index)  # a handle is not an index

    def _cuDeviceGetName(self, buffer: Any, size: int, handle: int) -> int:
        buffer.value = self.devices[handle - 40].name.encode()[: size - 1]
        return 0

    def _cuDeviceTotalMem_v2(self, out: Any, handle: int) -> int:
        return _store(out, self.devices[handle - 40].memory)

    def _cuDeviceGetAttribute(self, out: Any, attribute: int, handle: int) -> int:
        device = self.devices[handle - 40]
        return _store(out, {16: device.multiprocessors, 75: device.major, 76: device.minor}[attribute])


def _store(out: Any, value: int) -> int:
    out._obj.value = value
    return 0


@dataclass(frozen=True)
class FakeProbe(Probe):
    """A machine that is not this one. Nothing of this machine shows through."""

    architecture: str = "x86_64"
    python: Interpreter = Interpreter("3.12.3", "/venv/bin/python", "/venv", "/usr")
    files: Mapping[str, str] = field(default_factory=dict)
    directories: Mapping[str, list[str]] = field(default_factory=dict)
    commands: Mapping[tuple[str, ...], Output] = field(default_factory=dict)
    apt: Mapping[str, str] = field(default_factory=dict)
    packages: Mapping[str, str] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    libraries: Mapping[str, str] = field(default_factory=dict)
    libcuda: FakeCuda | None = None
    providers: tuple[str, ...] | None = ("CPUExecutionProvider",)
    disk: int | None = 200 * 10**9

    def system(self) -> tuple[str, str]:
        return "Linux", self.architecture

    def interpreter(self) -> Interpreter:
        return self.python

    def read_text(self, path: str) -> str | None:
        return self.files.get(path)

    def exists(self, path: str) -> bool:
        return path in self.files

    def names(self, directory: str) -> list[str]:
        return self.directories.get(directory, [])

    def run(self, *command: str) -> Output | None:
        if command[0] == "dpkg-query":
            known = [f"ii  {name} {self.apt[name]}" for name in command if name in self.apt]
            removed = "rc  libnvinfer8 8.6.2.3-1+cuda12.2"  # only its configuration is left
            return Output(1, "\n".join([*known, removed]), "dpkg-query: no packages found matching libnvinfer11")
        return self.commands.get(command)

    def package(self, name: str) -> str | None:
        return self.packages.get(name)

    def has_module(self, name: str) -> bool:
        return name in self.modules

    def find_library(self, name: str) -> str | None:
        return self.libraries.get(name)

    def load_library(self, name: str) -> Any:
        return self.libcuda if name == "libcuda.so.1" else None

    def onnxruntime_providers(self) -> list[str] | None:
        return None if self.providers is None else list(self.providers)

    def disk_free(self) -> int | None:
        return self.disk

    def but(self, **changes: Any) -> FakeProbe:
        """The same machine with something else. Mappings are merged; a value of None takes an entry away."""
        for name, change in changes.items():
            if isinstance(change, dict):
                merged = {**getattr(self, name), **change}
                changes[name] = {key: value for key, value in merged.items() if value is not None}
        return dataclasses.replace(self, **changes)


def imports(executable: str, version: str) -> dict[tuple[str, ...], Output]:
    return {(executable, "-c", IMPORT): Output(0, f"{version}\n", "")}


def import_fails(executable: str, error: str) -> dict[tuple[str, ...], Output]:
    return {(executable, "-c", IMPORT): Output(1, "", f"Traceback (most recent call last):\n  ...\n{error}\n")}


def memory(total_kib: int, swap_kib: int = 0) -> str:
    return MEMORY.format(total=total_kib, free=total_kib - 2_000_000, swap=swap_kib)


def power(mode: str) -> dict[tuple[str, ...], Output]:
    return {POWER_QUERY: Output(0, f"NVPM WARN: fan mode is not set!\nNV Power Mode: {mode}\n0\n", "")}


def power_file(*modes: str) -> str:
    head = "< PARAM TYPE=FILE NAME=CPU_ONLINE >\nCORE_0 /sys/devices/system/cpu/cpu0/online\n"
    return head + "".join(f"< POWER_MODEL ID={i} NAME={name} >\nCPU_ONLINE CORE_0 1\n" for i, name in enumerate(modes))


# A fresh JetPack 6.2 on the 64 GB AGX Orin, sfexport in a venv that sees the system's packages.
ORIN_62 = FakeProbe(
    architecture="aarch64",
    python=Interpreter("3.10.12", "/home/me/venv/bin/python", "/home/me/venv", "/usr"),
    files={
        "/proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit",
        "/etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64",
        "/etc/nvpmodel.conf": power_file("MAXN", "MODE_15W", "MODE_30W", "MODE_50W"),
        "/proc/meminfo": memory(64_349_000, 32_000_000),
        "/home/me/venv/pyvenv.cfg": "home = /usr/bin\ninclude-system-site-packages = true\nversion = 3.10.12\n",
        "/dev/nvhost-gpu": "",
    },
    commands=power("MAXN") | imports("/home/me/venv/bin/python", "10.3.0"),
    apt={
        "nvidia-jetpack": "6.2+b77",
        "libnvinfer10": "10.3.0.30-1+cuda12.5",
        "python3-libnvinfer": "10.3.0.30-1+cuda12.5",
    },
    packages={
        "tensorrt": "10.3.0",
        "numpy": "2.2.6",
        "triton": "3.8.0",
        "cuda-python": "12.9.10",
        "polygraphy": "0.53.6",
        "onnxruntime": "1.23.2",
    },
    modules=("tensorrt",),
    libraries={"nvinfer": "libnvinfer.so.10"},
    libcuda=FakeCuda(12060, (Device("Orin", 8, 7, 16, 65_893_376_000),)),
)

# The same board with JetPack 7.2, whose meta package is not installed: the BSP alone tells its version.
ORIN_72 = ORIN_62.but(
    python=Interpreter("3.12.3", "/home/me/venv/bin/python", "/home/me/venv", "/usr"),
    files={"/etc/nv_tegra_release": "# R39 (release), REVISION: 2.0, GCID: 45755727, BOARD: generic, EABI: aarch64"},
    commands=imports("/home/me/venv/bin/python", "10.16.2.10"),
    apt={
        "nvidia-jetpack": None,
        "libnvinfer10": "10.16.2.10-1+cuda13.2",
        "python3-libnvinfer": "10.16.2.10-1+cuda13.2",
    },
    packages={"tensorrt": "10.16.2.10", "numpy": "2.3.5", "cuda-python": "13.2.0"},
    libcuda=FakeCuda(13020, (Device("Orin", 8, 7, 16, 65_893_376_000),)),
)

ORIN_NANO = ORIN_62.but(
    files={
        "/proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
        "/etc/nvpmodel.conf": power_file("15W", "25W", "MAXN_SUPER", "7W"),
        "/proc/meminfo": memory(7_802_000, 3_900_000),
    },
    commands=power("25W"),
    libcuda=FakeCuda(12060, (Device("Orin", 8, 7, 8, 7_989_000_000),)),
)

THOR = ORIN_72.but(
    files={
        "/proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit",
        "/etc/nv_tegra_release": "# R38 (release), REVISION: 4.0, GCID: 43443517, BOARD: generic, EABI: aarch64",
        "/etc/nvpmodel.conf": power_file("MAXN", "120W"),
        "/proc/meminfo": memory(128_790_000),
        "/dev/nvhost-gpu": None,
    },
    commands=imports("/home/me/venv/bin/python", "10.13.3.9"),
    apt={"libnvinfer10": "10.13.3.9-1+cuda13.0", "python3-libnvinfer": "10.13.3.9-1+cuda13.0"},
    packages={"tensorrt": "10.13.3.9"},
    libcuda=FakeCuda(13000, (Device("NVIDIA Thor", 11, 0, 20, 131_881_000_000),)),
)

H100 = FakeProbe(
    files={
        "/proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release",
        "/proc/meminfo": memory(528_000_000),
        "/venv/pyvenv.cfg": "include-system-site-packages = false\n",
        "/dev/nvidia0": "",
    },
    commands=imports("/venv/bin/python", "11.4.0.106"),
    packages={
        "tensorrt-cu13": "11.4.0.106",
        "numpy": "2.4.6",
        "triton": "3.9.0",
        "cuda-bindings": "13.5.0",
        "onnxruntime-gpu": "1.31.1",
    },
    modules=("tensorrt",),
    libcuda=FakeCuda(13000, (Device("NVIDIA H100 80GB HBM3", 9, 0, 132, 85_028_000_000),)),
    providers=("CUDAExecutionProvider", "CPUExecutionProvider"),
)

LAPTOP = FakeProbe(
    files={"/proc/meminfo": memory(16_000_000), "/venv/pyvenv.cfg": "include-system-site-packages = false\n"},
    packages={"onnxruntime": "1.31.1", "numpy": "2.4.6"},
)
