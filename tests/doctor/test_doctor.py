"""`sfexport doctor`: what it reads of a machine, and what it says and advises, on machines good and bad."""

from __future__ import annotations

import importlib.metadata
import json
import platform

import pytest
from fake_machines import (
    H100,
    LAPTOP,
    ORIN_62,
    ORIN_72,
    ORIN_NANO,
    THOR,
    FakeCuda,
    FakeProbe,
    import_fails,
    imports,
    memory,
    power,
)
from helpers import strict_json

from sfexport.doctor.diagnosis import Diagnosis, examine, show
from sfexport.machines.machine import Gpu, detect_machine
from sfexport.machines.probe import Interpreter, Output, Probe
from sfexport.machines.targets import find_target

VENV_PYTHON = ORIN_62.python.executable
BLIND_VENV = {"/home/me/venv/pyvenv.cfg": "home = /usr/bin\ninclude-system-site-packages = false\n"}
BARE_CARD = {
    "/proc/meminfo": memory(64_000_000),
    "/sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de",
    "/sys/bus/pci/devices/0000:01:00.0/class": "0x030200",
}


def report(probe: Probe, target: str | None = None) -> Diagnosis:
    return examine(detect_machine(probe), find_target(target) if target else None)


def verdicts(found: Diagnosis) -> dict[str, str]:
    return {line.name: line.verdict for line in found.checks}


def fix(found: Diagnosis, name: str) -> str:
    return next(line.fix for line in found.checks if line.name == name)


def seen(found: Diagnosis, name: str) -> str:
    return next(line.seen for line in found.checks if line.name == name)


@pytest.mark.parametrize(
    ("probe", "target"),
    [(ORIN_62, "jetson-orin-agx-64"), (ORIN_72, "jetson-orin-agx-64"), (THOR, "jetson-thor"), (H100, "h100")],
)
def test_a_machine_with_everything(probe: FakeProbe, target: str) -> None:
    for found in (report(probe), report(probe, target)):
        assert found.target == target
        assert set(verdicts(found).values()) == {"ok"}, found.checks
        assert not any(line.fix for line in found.checks)
        assert found.can_build and found.can_run_onnxruntime and found.exit_code == 0
        assert "can be built" in found.summary()[0] and "can be built" in found.summary()[1]


def test_what_is_read_of_an_orin() -> None:
    machine = detect_machine(ORIN_62)
    assert machine.gpus == (Gpu("Orin", 87, 16, 65.893376),)
    assert (machine.cuda.cuda, machine.jetpack, machine.l4t) == ("12.6", "6.2", "36.4.3")
    assert machine.power_modes == {"MAXN": 0, "MODE_15W": 1, "MODE_30W": 2, "MODE_50W": 3}
    assert machine.power_mode == "MAXN"
    assert machine.memory_gb == pytest.approx(65.89, abs=0.01)
    assert machine.swap_gb == pytest.approx(32.77, abs=0.01)
    assert (machine.in_venv, machine.system_packages) == (True, True)
    assert (machine.tensorrt.version, machine.tensorrt.library) == ("10.3.0", "libnvinfer.so.10")


def test_what_is_read_of_a_datacenter_host() -> None:
    machine = detect_machine(H100)
    assert (machine.cuda.driver, machine.cuda.cuda, machine.jetson_model) == ("580.65.06", "13.0", None)
    assert machine.gpus[0].name == "NVIDIA H100 80GB HBM3"
    assert machine.power_mode is None


@pytest.mark.parametrize(
    ("release", "jetpack"),
    [
        ("R35 (release), REVISION: 4.1", "5.1"),
        ("R36 (release), REVISION: 3.0", "6.0"),
        ("R36 (release), REVISION: 4.0", "6.1"),
        ("R36 (release), REVISION: 4.3", "6.2"),
        ("R36 (release), REVISION: 4.7", "6.2.1"),
        ("R36 (release), REVISION: 5.0", "6.2.2"),
        ("R38 (release), REVISION: 2.2", "7.0"),
        ("R38 (release), REVISION: 4.0", "7.1"),
        ("R39 (release), REVISION: 2.0", "7.2"),
        ("R39 (release), REVISION: 2.1", "7.2.1"),
        ("R32 (release), REVISION: 7.1", None),
        ("something else", None),
    ],
)
def test_jetpack_from_jetson_linux(release: str, jetpack: str | None) -> None:
    probe = ORIN_62.but(files={"/etc/nv_tegra_release": f"# {release}, GCID: 1"}, apt={"nvidia-jetpack": None})
    assert detect_machine(probe).jetpack == jetpack


def test_a_laptop_builds_for_onnx_runtime_and_prepares_for_others() -> None:
    found = report(LAPTOP)
    assert not found.can_build and found.can_run_onnxruntime and found.exit_code == 0
    assert verdicts(found)["GPU"] == "missing" and "TensorRT" not in verdicts(found)
    assert found.summary() == [
        "TensorRT engines cannot be built here; there is no NVIDIA GPU.",
        "ONNX Runtime engines can be built and run here.",
    ]
    wanted = report(LAPTOP, "jetson-orin-nx-16")
    assert wanted.exit_code == 1, "asked for a board, this is none"
    assert wanted.summary()[0] == (
        "TensorRT engines for jetson-orin-nx-16 cannot be built here; there is no NVIDIA GPU."
    )
    assert "--target jetson-orin-nx-16 --check" in fix(wanted, "GPU")
    assert verdicts(wanted)["triton"] == "warning" and fix(wanted, "triton") == "pip install triton"


def test_libraries_that_are_too_old() -> None:
    """The versions that pyproject asks for."""
    found = report(LAPTOP.but(packages={"onnxruntime": "1.19.2", "triton": "3.3.1"}))
    assert found.missing == ["GPU", "onnxruntime"] and found.exit_code == 1
    assert fix(found, "onnxruntime") == "pip install --upgrade onnxruntime-gpu"
    assert verdicts(found)["triton"] == "warning" and fix(found, "triton") == "pip install 'triton>=3.7'"


def test_a_laptop_without_onnx_runtime() -> None:
    found = report(LAPTOP.but(providers=None, packages={"onnxruntime": None}))
    assert found.exit_code == 1 and not found.can_run_onnxruntime
    assert fix(found, "onnxruntime") == "pip install --force-reinstall onnxruntime-gpu"
    arm = report(ORIN_62.but(providers=None))
    assert arm.can_build and arm.exit_code == 0, "TensorRT does not need it"
    assert fix(arm, "onnxruntime") == "pip install --force-reinstall onnxruntime"
    assert "cannot be imported" in seen(arm, "onnxruntime")


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        # The libraries are there and the module is, for the system's Python; this venv does not look there.
        ({"files": BLIND_VENV, "modules": ()}, "/usr/bin/python3 -m venv --system-site-packages /home/me/venv"),
        ({"modules": (), "apt": {"python3-libnvinfer": None}}, "sudo apt install python3-libnvinfer"),
        (
            {"modules": (), "apt": {"libnvinfer10": None}, "libraries": {"nvinfer": None}},
            "sudo apt install python3-libn",
        ),
        (
            {
                "modules": (),
                "apt": {"nvidia-jetpack": None, "libnvinfer10": None, "python3-libnvinfer": None},
                "libraries": {"nvinfer": None},
            },
            "sudo apt update && sudo apt install nvidia-jetpack",
        ),
        (
            {"commands": import_fails(VENV_PYTHON, "ImportError: libnvinfer.so.10: cannot open shared object file")},
            "sudo apt install --reinstall",
        ),
        # All is installed, and this venv sees it.
        ({"modules": ()}, "sudo apt install --reinstall"),
    ],
)
def test_tensorrt_that_a_jetson_does_not_find(changes: dict, advice: str) -> None:
    found = report(ORIN_62.but(**changes))
    assert verdicts(found)["TensorRT"] == "missing"
    assert advice in fix(found, "TensorRT")
    assert not found.can_build and found.can_run_onnxruntime and found.exit_code == 1
    assert found.summary()[0] == "TensorRT engines cannot be built here; missing: TensorRT."
    assert "pip install" not in fix(found, "TensorRT"), "what pip brings is not for a Jetson"


def test_a_jetson_with_a_python_of_its_own() -> None:
    """apt's bindings are compiled for the system's Python: no venv option makes another one see them."""
    python = Interpreter("3.12.8", "/home/me/.pyenv/bin/python", "/home/me/.pyenv", "/home/me/.pyenv")
    found = report(ORIN_62.but(python=python, modules=()))
    assert verdicts(found)["Python"] == "warning" and verdicts(found)["TensorRT"] == "missing"
    for name in ("Python", "TensorRT"):
        assert "/usr/bin/python3 -m venv --system-site-packages ~/sfexport-venv" in fix(found, name)


def test_the_import_says_why_it_fails() -> None:
    error = "ImportError: libnvinfer.so.10: cannot open shared object file"
    found = report(ORIN_62.but(commands=import_fails(VENV_PYTHON, error)))
    assert seen(found, "TensorRT") == f"10.3.0 {error}"
    crashed = ORIN_62.but(commands={(VENV_PYTHON, *list(imports(VENV_PYTHON, ""))[0][1:]): Output(-11, "", "")})
    assert "ends the process" in seen(report(crashed), "TensorRT")
    hangs = ORIN_62.but(commands={list(imports(VENV_PYTHON, ""))[0]: None})
    assert "does not end" in seen(report(hangs), "TensorRT")


def test_jetpack_6_0_is_too_old() -> None:
    probe = ORIN_62.but(apt={"nvidia-jetpack": "6.0+b106"}, commands=imports(VENV_PYTHON, "8.6.2"))
    found = report(probe.but(libcuda=FakeCuda(12020, ORIN_62.libcuda.devices)))
    assert {"JetPack", "TensorRT", "CUDA driver"} <= set(found.missing)
    assert "6.2 or 7.2" in fix(found, "JetPack") and "6.2 or 7.2" in fix(found, "TensorRT")


def test_power_modes_are_told_by_the_boards_own_numbers() -> None:
    found = report(ORIN_NANO)
    assert fix(found, "power mode") == "sudo nvpmodel -m 2"
    assert found.can_build, "slow is not broken"
    assert fix(report(ORIN_62.but(commands=power("MODE_30W"))), "power mode") == "sudo nvpmodel -m 0"
    unknown = report(ORIN_62.but(commands={("nvpmodel", "-q"): None}))
    assert fix(unknown, "power mode") == "sudo nvpmodel -q"
    assert verdicts(report(ORIN_NANO.but(commands=power("MAXN_SUPER"))))["power mode"] == "ok"


def test_memory_and_disk_that_the_full_model_does_not_fit_in() -> None:
    found = report(ORIN_NANO.but(disk=4 * 10**9))
    assert verdicts(found)["memory"] == verdicts(found)["disk"] == "warning"
    assert found.can_build, "a smaller model fits"


@pytest.mark.parametrize(
    ("libcuda", "name", "advice"),
    [
        (None, "CUDA driver", "nvidia-driver-580-server"),
        (FakeCuda(12020, H100.libcuda.devices), "CUDA driver", "nvidia-driver-580-server"),
        (FakeCuda(13000, (), {"cuInit": 100}), "GPU", "CUDA_VISIBLE_DEVICES"),
        (FakeCuda(13000, (), {"cuInit": 803}), "GPU", "reboot"),
        (FakeCuda(13000, (), {"cuDeviceGetCount": 999}), "GPU", "dmesg"),
    ],
)
def test_drivers_that_do_not_work(libcuda: FakeCuda | None, name: str, advice: str) -> None:
    found = report(H100.but(libcuda=libcuda), "h100")
    assert name in found.missing
    assert advice in fix(found, name)
    assert found.nvidia and found.exit_code == 1


def test_a_card_without_a_driver_is_still_a_card() -> None:
    directories = {"/sys/bus/pci/devices": ["0000:00:1f.0", "0000:01:00.0"]}
    found = report(LAPTOP.but(files=BARE_CARD, directories=directories))
    assert found.nvidia and found.exit_code == 1
    assert "CUDA driver" in found.missing
    audio = {"/sys/bus/pci/devices/0000:01:00.0/class": "0x040300"}
    assert not report(LAPTOP.but(files=BARE_CARD | audio, directories=directories)).nvidia


def test_a_datacenter_host_without_tensorrt_gets_what_fits_its_driver() -> None:
    bare = H100.but(modules=(), packages={"tensorrt-cu13": None, "cuda-bindings": None})
    found = report(bare)
    assert found.missing == ["TensorRT", "cuda-python"]
    assert fix(found, "TensorRT") == "pip install 'sfexport[tensorrt]'"
    assert fix(found, "cuda-python") == "pip install 'cuda-python>=12.6,<14'"
    older = report(bare.but(libcuda=FakeCuda(12080, H100.libcuda.devices)))
    assert fix(older, "TensorRT").startswith("pip install tensorrt-cu12 ")
    assert fix(older, "cuda-python") == "pip install 'cuda-python>=12.6,<13'"


def test_libraries_that_are_too_new_for_the_driver() -> None:
    older = FakeCuda(12080, H100.libcuda.devices)
    found = report(H100.but(libcuda=older))
    assert found.missing == ["TensorRT", "cuda-python"]
    assert "uninstall" in fix(found, "TensorRT") and "tensorrt-cu12 " in fix(found, "TensorRT")
    fitting = {"tensorrt-cu13": None, "tensorrt-cu12": "11.4.0.106", "cuda-bindings": "12.9.10"}
    assert report(H100.but(libcuda=older, packages=fitting)).can_build


@pytest.mark.parametrize(
    ("version", "numpy", "verdict"),
    [("10.16.1.11", "2.4.6", "warning"), ("10.16.1.11", "2.3.5", "ok"), ("10.3.0", "2.4.6", None)],
)
def test_numpy_that_quick_plugins_do_not_stand(version: str, numpy: str, verdict: str | None) -> None:
    found = report(H100.but(commands=imports("/venv/bin/python", version), packages={"numpy": numpy}))
    assert verdicts(found).get("numpy") == verdict
    assert found.can_build


@pytest.mark.parametrize(("version", "verdict"), [("8.6.1", "missing"), ("10.3.0", "ok"), ("12.0.0", "warning")])
def test_versions_of_tensorrt(version: str, verdict: str) -> None:
    assert verdicts(report(H100.but(commands=imports("/venv/bin/python", version))))["TensorRT"] == verdict


def test_engines_are_built_on_the_machine_they_are_for() -> None:
    other_gpu = report(H100, "jetson-thor")
    assert "GPU" in other_gpu.missing and "--target jetson-thor --check" in fix(other_gpu, "GPU")
    sibling = report(H100, "h200")
    assert verdicts(sibling)["machine"] == "warning" and "This machine is h100" in fix(sibling, "machine")
    assert sibling.can_build


def test_a_machine_outside_the_table_is_not_taken_for_the_target() -> None:
    laptop = report(LAPTOP, "jetson-orin-agx-64")
    assert verdicts(laptop)["machine"] == "warning" and "not known as jetson-orin-agx-64" in fix(laptop, "machine")
    assert "GPU" in laptop.missing and laptop.exit_code == 1
    device = H100.libcuda.devices[0].__class__
    smaller = H100.but(libcuda=FakeCuda(13000, (device("NVIDIA A100-PCIE-40GB", 8, 0, 108, 42_400_000_000),)))
    assert verdicts(report(smaller, "a100"))["machine"] == "warning"


def test_a_gpu_outside_the_table_is_judged_by_general_rules() -> None:
    device = H100.libcuda.devices[0].__class__
    found = report(H100.but(libcuda=FakeCuda(13000, (device("NVIDIA GeForce RTX 4080", 8, 9, 76, 17_171_000_000),))))
    assert found.target is None and found.can_build and verdicts(found)["machine"] == "warning"
    old = report(H100.but(libcuda=FakeCuda(13000, (device("Tesla T4", 7, 5, 40, 16_000_000_000),))))
    assert "GPU" in old.missing


def test_python_3_9_is_too_old_for_everything() -> None:
    found = report(LAPTOP.but(python=Interpreter("3.9.19", "/venv/bin/python", "/venv", "/usr")))
    assert "Python" in found.missing and found.exit_code == 1


def test_nobody_is_told_to_install_torch() -> None:
    for probe in (ORIN_62, ORIN_72, ORIN_NANO, THOR, H100, LAPTOP):
        found = report(probe.but(modules=(), packages={"torch": None}))
        assert verdicts(found)["torch"] == "ok"
        assert not any("torch" in line.fix for line in found.checks)


def test_a_machine_that_tells_nothing() -> None:
    found = report(FakeProbe(providers=None, disk=None))
    assert found.exit_code == 1
    assert seen(found, "memory") == "unknown"


def test_the_table_is_what_the_report_says(capsys: pytest.CaptureFixture) -> None:
    found = report(ORIN_62.but(files=BLIND_VENV, modules=()))
    show(found)
    printed = capsys.readouterr().out
    for line in found.checks:
        assert line.name in printed and line.seen in printed and line.fix in printed
    for sentence in found.summary():
        assert sentence in printed


def test_json() -> None:
    document = strict_json(json.dumps(report(ORIN_NANO).to_json()))
    assert document["target"] == "jetson-orin-nano-8" and document["can_build"] is True
    assert {"name", "seen", "expected", "verdict", "fix"} == set(document["lines"][0])


def test_this_machine() -> None:
    """Whatever it is: the examination ends, and says of it what can be seen by other means."""
    machine = detect_machine()
    found = examine(machine)
    assert seen(found, "Python").startswith(platform.python_version())
    assert machine.architecture == platform.machine()
    assert verdicts(found)["onnxruntime"] == "ok"
    if not machine.cuda.device:
        assert found.missing == ["GPU"] and found.exit_code == 0
    else:
        assert found.can_build == (found.exit_code == 0)


def test_the_probe_answers_instead_of_raising() -> None:
    probe = Probe()
    assert probe.read_text("/no/such/file") is None
    assert probe.names("/no/such/directory") == []
    assert not probe.exists("/no/such/file")
    assert probe.run("no-such-command-anywhere") is None
    assert probe.run(probe.interpreter().executable, "-c", "raise SystemExit(3)").code == 3
    assert probe.package("no-such-distribution") is None
    assert probe.package("numpy") == importlib.metadata.version("numpy")
    assert not probe.has_module("no_such_module") and probe.has_module("json")
    assert probe.find_library("no-such-library") is None
    assert probe.load_library("libno-such-library.so.1") is None
    assert probe.disk_free() > 0
    assert "CPUExecutionProvider" in probe.onnxruntime_providers()
