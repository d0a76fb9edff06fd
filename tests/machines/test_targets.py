"""The table of targets: every row whole, the right one found, wrong names refused with what there is."""

from __future__ import annotations

import pytest
from fake_machines import H100, LAPTOP, ORIN_62, ORIN_72, ORIN_NANO, THOR, Device, FakeCuda, FakeProbe, memory
from helpers import assert_says

from sfexport.errors import InputError
from sfexport.kernels.launch_config import SMS
from sfexport.machines.machine import detect_machine
from sfexport.machines.targets import (
    Target,
    find_target,
    kernel_ptx_isa,
    load_targets,
    match_machine,
    newest_ptx_isa,
    oldest_cuda,
)
from sfexport.versions import NEWEST_TENSORRT, OLDEST, version_numbers

ALL = [target for choices in load_targets().values() for target in choices]
ORINS = ["jetson-orin-agx-64", "jetson-orin-agx-32", "jetson-orin-nx-16", "jetson-orin-nx-8", "jetson-orin-nano-8"]

RTX_CARDS = ["rtx-4090", "rtx-6000-ada", "rtx-5090", "rtx-pro-6000"]


def test_the_rows_are_those_of_the_design() -> None:
    assert list(load_targets()) == [*ORINS, "jetson-thor", "a100", "l4", "h100", "h200", "b200", *RTX_CARDS]
    assert [find_target(name).sm for name in load_targets()] == [87] * 5 + [110, 80, 89, 90, 90, 100] + [
        89,
        89,
        120,
        120,
    ]


@pytest.mark.parametrize("target", ALL, ids=lambda t: f"{t.name}-{t.jetpack}")
def test_every_row_is_whole(target: Target) -> None:
    assert target.name.startswith("jetson") == (target.jetpack is not None) == target.shared_memory
    assert target.sm in SMS
    assert OLDEST["tensorrt"] <= version_numbers(target.tensorrt) <= NEWEST_TENSORRT
    assert version_numbers(target.python) >= OLDEST["python"]
    assert {"fp32", "fp16", "bf16"} <= set(target.precisions)
    assert ("fp8" in target.precisions) == (target.sm >= 89)
    assert ("nvfp4" in target.precisions) == (target.sm >= 100)
    for figure in (target.multiprocessors, target.memory_gb, target.bandwidth_gbs, target.fp16_tflops):
        assert figure > 0


@pytest.mark.parametrize("target", ALL, ids=lambda t: f"{t.name}-{t.jetpack}")
def test_its_driver_takes_its_kernels(target: Target) -> None:
    assert target.ptx_isa == kernel_ptx_isa(target.sm) <= newest_ptx_isa(target.cuda)


@pytest.mark.parametrize("target", ALL, ids=lambda t: f"{t.name}-{t.jetpack}")
def test_the_kernel_compiles_for_it(target: Target) -> None:
    pytest.importorskip("triton", reason="the kernel is written in Triton, which is not installed")
    from sfexport.kernels.compile import compile_kernels, ptx_version

    for kernel in compile_kernels("fp16", 128, target.sm, target.ptx_isa):
        assert ptx_version(kernel.ptx) == f"{target.ptx_isa / 10:.1f}"


@pytest.mark.parametrize(
    ("cuda", "isa"),
    [("11.8", 0), ("12.0", 80), ("12.5", 85), ("12.6", 85), ("12.8", 87), ("13.0", 90), ("13.2", 92), ("13.9", 92)],
)
def test_ptx_of_a_cuda_version(cuda: str, isa: int) -> None:
    assert newest_ptx_isa(cuda) == isa
    if isa:
        assert version_numbers(oldest_cuda(isa)) <= version_numbers(cuda)


def test_what_no_kernel_or_driver_is_known_for_is_refused() -> None:
    with pytest.raises(InputError, match=r"7\.2"):
        kernel_ptx_isa(72)
    with pytest.raises(InputError, match=r"99\.9"):
        oldest_cuda(999)


@pytest.mark.parametrize("name", ORINS)
def test_an_orin_has_two_jetpacks(name: str) -> None:
    first, second = find_target(name, "6.2"), find_target(name, "7.2")
    assert find_target(name) == first
    assert (first.tensorrt, first.cuda, first.python) == ("10.3", "12.6", "3.10")
    assert (second.tensorrt, second.cuda, second.python) == ("10.16", "13.2", "3.12")


def test_thor() -> None:
    assert find_target("jetson-thor").jetpack == "7.2"
    assert find_target("jetson-thor", "7.1").tensorrt == "10.13"


def test_an_unknown_name_is_answered_with_all_names() -> None:
    with pytest.raises(InputError) as caught:
        find_target("jetson-nano")
    assert_says(caught.value.paragraph(), "'jetson-nano'", *load_targets())


@pytest.mark.parametrize("jetpack", ["5.1", "6.2.1", ""])
def test_a_jetpack_that_the_board_does_not_have(jetpack: str) -> None:
    with pytest.raises(InputError) as caught:
        find_target("jetson-orin-nx-16", jetpack)
    assert_says(caught.value.paragraph(), "jetson-orin-nx-16", f"JetPack {jetpack}", "6.2, 7.2")


def test_a_datacenter_gpu_has_no_jetpack() -> None:
    with pytest.raises(InputError) as caught:
        find_target("h100", "6.2")
    assert_says(caught.value.paragraph(), "h100", "Jetson", "--jetpack")


def with_jetson(model: str, kib: int, release: str = "R36 (release), REVISION: 4.4") -> FakeProbe:
    files = {"/proc/device-tree/model": model, "/etc/nv_tegra_release": f"# {release}", "/proc/meminfo": memory(kib)}
    return ORIN_62.but(files=files, apt={"nvidia-jetpack": None})


def with_gpu(name: str, multiprocessors: int, memory_gb: float) -> FakeProbe:
    return H100.but(libcuda=FakeCuda(13000, (Device(name, 9, 0, multiprocessors, int(memory_gb * 1e9)),)))


@pytest.mark.parametrize(
    ("probe", "name", "jetpack"),
    [
        (ORIN_62, "jetson-orin-agx-64", "6.2"),
        (ORIN_72, "jetson-orin-agx-64", "7.2"),
        (ORIN_NANO, "jetson-orin-nano-8", "6.2"),
        (THOR, "jetson-thor", "7.1"),
        (with_jetson("NVIDIA Jetson AGX Orin Developer Kit", 30_700_000), "jetson-orin-agx-32", "6.2"),
        (
            with_jetson("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", 16_031_000),
            "jetson-orin-nx-16",
            "6.2",
        ),
        (with_jetson("NVIDIA Jetson Orin NX Developer Kit Super", 7_802_000), "jetson-orin-nx-8", "6.2"),
        # A JetPack between two rows has the versions of the next one, an unknown newer one those of the last.
        (ORIN_62.but(apt={"nvidia-jetpack": "6.1+b123"}), "jetson-orin-agx-64", "6.2"),
        (THOR.but(files={"/etc/nv_tegra_release": "# R38 (release), REVISION: 2.2,"}), "jetson-thor", "7.1"),
        (THOR.but(apt={"nvidia-jetpack": "7.9-b1"}), "jetson-thor", "7.2"),
        (ORIN_62.but(files={"/etc/nv_tegra_release": None}, apt={"nvidia-jetpack": None}), "jetson-orin-agx-64", "6.2"),
        (H100, "h100", None),
        (with_gpu("NVIDIA H200", 132, 150.8), "h200", None),
        (with_gpu("NVIDIA A100-SXM4-80GB", 108, 85.1), "a100", None),
        (with_gpu("NVIDIA L4", 58, 23.7), "l4", None),
        (with_gpu("NVIDIA B200", 148, 191.5), "b200", None),
        (with_gpu("NVIDIA GeForce RTX 4090", 128, 25.4), "rtx-4090", None),
        (with_gpu("NVIDIA RTX 6000 Ada Generation", 142, 51.0), "rtx-6000-ada", None),
        (with_gpu("NVIDIA GeForce RTX 5090", 170, 33.6), "rtx-5090", None),
        (with_gpu("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 188, 101.9), "rtx-pro-6000", None),
    ],
)
def test_a_machine_finds_its_row(probe: FakeProbe, name: str, jetpack: str | None) -> None:
    found = match_machine(detect_machine(probe))
    assert found is not None
    assert (found.name, found.jetpack) == (name, jetpack)


@pytest.mark.parametrize(
    "probe",
    [
        LAPTOP,
        with_jetson("NVIDIA Jetson AGX Xavier", 32_000_000),
        with_jetson("NVIDIA Jetson Orin Nano Developer Kit", 3_700_000),
        with_gpu("NVIDIA L40S", 142, 48.0),
        with_gpu("NVIDIA A100-SXM4-40GB", 108, 42.4),
        with_gpu("NVIDIA H100 PCIe", 114, 85.0),
        with_gpu("NVIDIA H200 MIG 1g.18gb", 16, 18.0),
        with_gpu("NVIDIA GeForce RTX 3090", 82, 25.4),
        with_gpu("NVIDIA GeForce RTX 4090 Laptop GPU", 76, 17.1),
        with_gpu("Quadro RTX 6000", 72, 25.2),
    ],
    ids=lambda p: p.files.get("/proc/device-tree/model") or (p.libcuda.devices[0].name if p.libcuda else "laptop"),
)
def test_a_machine_that_the_table_does_not_have(probe: FakeProbe) -> None:
    assert match_machine(detect_machine(probe)) is None
