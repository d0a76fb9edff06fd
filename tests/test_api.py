"""The Python door: three lines to an answer, and frames from memory answered about as those of a file."""

from __future__ import annotations

import ast
import io
import json
import math
import pydoc
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn_clip import write_clip
from helpers import assert_says, document
from helpers import sfexport as run_command
from PIL import Image, ImageSequence

import sfexport
from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.demo.clip import write_frames
from sfexport.demo.run import CLIP, demo_questions
from sfexport.demo.scenes import FPS, SIZE, UPSCALE, video_frames
from sfexport.demo.shipped import SHIPPED
from sfexport.engines.build import build
from sfexport.errors import BundleError, InputError, VideoError
from sfexport.exporting.export import ExportOptions, export
from sfexport.qa.pipeline import Pipeline
from sfexport.video.decoding import Video

OVERVIEW, DETAIL = demo_questions()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model's engines, the demo's clip, and a clip of 40 frames, more than are sampled."""
    made = tmp_path_factory.mktemp("api")
    build(export(Checkpoint.open(SHIPPED), made / "bundle", ExportOptions()), made / "engines", "onnxruntime")
    write_frames(made / "demo.mp4", video_frames(*CLIP), FPS, (SIZE * UPSCALE, SIZE * UPSCALE))
    write_clip(made / "long.mp4", seconds=4, fps=10, size=(96, 64))
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> Pipeline:
    return sfexport.load(folder / "engines")


def decoded(path: Path) -> np.ndarray:
    """uint8 [T, H, W, 3]: every frame of a file."""
    with Video.open(path) as video:
        return np.stack(list(video.frames(range(video.info.frame_count))))


@pytest.fixture(scope="module")
def clip(folder: Path) -> np.ndarray:
    return decoded(folder / "demo.mp4")


@pytest.fixture(scope="module")
def long(folder: Path) -> np.ndarray:
    return decoded(folder / "long.mp4")


# Loading and asking.


def test_three_lines_answer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    model = sfexport.load("engines")
    assert model.encode("demo.mp4").ask(DETAIL.text).answer == DETAIL.answer


def test_importing_sfexport_imports_nothing_else() -> None:
    code = "import sys; before = set(sys.modules); import sfexport; print(sorted(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(ast.literal_eval(run.stdout)) <= {"__future__", "sfexport", "sfexport.__version__"}


def test_loading_what_is_no_engine_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nowhere"):
        sfexport.load(tmp_path / "nowhere")


def test_options_come_from_the_checkpoint(model: Pipeline, clip: np.ndarray) -> None:
    session = model.encode(clip)
    default = session.ask(OVERVIEW.text)
    given = session.ask(OVERVIEW.text, model.generation_options())
    assert default.ids == given.ids
    assert default.answer == OVERVIEW.answer


def test_keywords_change_options(model: Pipeline, clip: np.ndarray) -> None:
    session = model.encode(clip)
    hot = {"temperature": 9.0, "top_k": 200, "top_p": 0.99, "max_new_tokens": 12}
    first, again, other = (session.ask(DETAIL.text, seed=seed, **hot).ids for seed in (1, 1, 2))
    assert first == again != other
    options = model.generation_options().override(seed=1, **hot)
    assert session.ask(DETAIL.text, options).ids == first
    assert session.ask(DETAIL.text, options, temperature=0).answer == DETAIL.answer
    assert session.ask(DETAIL.text, max_new_tokens=1).new_tokens == 1
    penalised = session.ask(DETAIL.text, repetition_penalty=1000.0, max_new_tokens=12).ids
    assert len(set(penalised)) == len(penalised)


def test_the_mode_is_a_keyword(model: Pipeline, clip: np.ndarray) -> None:
    """The model was trained with 'trained', which its config.json says."""
    session = model.encode(clip)
    default, trained, released = (session.ask(DETAIL.text, mode=mode).ids for mode in (None, "trained", "released"))
    assert default == trained
    pieces: list[str] = []
    assert session.ask(DETAIL.text, mode="released", on_text=pieces.append).ids == released
    assert pieces
    with pytest.raises(InputError, match="paper"):
        session.ask(DETAIL.text, mode="paper")


def test_keywords_without_meaning_are_refused(model: Pipeline, clip: np.ndarray) -> None:
    session = model.encode(clip[:1])
    with pytest.raises(TypeError, match="max_tokens"):
        session.ask(DETAIL.text, max_tokens=5)
    for wrong in ({"max_new_tokens": 0}, {"temperature": -1}, {"top_p": 0.5}, {"temperature": 1, "top_p": 2}):
        with pytest.raises(InputError):
            session.ask(DETAIL.text, **wrong)
    with pytest.raises(InputError, match="not a list"):
        session.ask([DETAIL.text])


# Frames from memory.


def pictures(frames: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in frames]


def tensor(frames: np.ndarray) -> Any:
    return pytest.importorskip("torch").from_numpy(frames.copy())


KINDS: dict[str, Callable[[np.ndarray], Any]] = {
    "array": lambda frames: frames,
    "array with strides": lambda frames: np.asfortranarray(frames),
    "list of arrays": list,
    "tuple of PIL images": lambda frames: tuple(pictures(frames)),
    "arrays and PIL images": lambda frames: [*frames[:5], *pictures(frames[5:])],
    "torch tensor": tensor,
    "permuted torch tensor": lambda frames: tensor(frames.transpose(0, 3, 1, 2)).permute(0, 2, 3, 1),
    "list of torch tensors": lambda frames: list(tensor(frames)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_frames_in_memory_are_answered_about_as_the_file(
    kind: str, model: Pipeline, folder: Path, clip: np.ndarray
) -> None:
    of_file, of_memory = model.encode(folder / "demo.mp4"), model.encode(KINDS[kind](clip))
    assert (of_memory.frames, of_memory.fast_tokens) == (of_file.frames, of_file.fast_tokens)
    for question in (OVERVIEW, DETAIL):
        expected, answer = of_file.ask(question.text), of_memory.ask(question.text)
        assert answer.ids == expected.ids
        assert (answer.answer, answer.frames_encoded) == (question.answer, expected.frames_encoded)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 7, 40, 90])
def test_frames_in_memory_are_sampled_as_the_file(
    kind: str, count: int, model: Pipeline, folder: Path, long: np.ndarray
) -> None:
    """Fewer than asked for are repeated, as of a short clip."""
    pixels, rows = model.read_frames(folder / "long.mp4", count, "linspace")
    same, same_rows = model.read_frames(KINDS[kind](long), count, "linspace")
    assert np.array_equal(same, pixels)
    assert np.array_equal(same_rows, rows)


def test_frames_that_are_repeated_are_encoded_once(model: Pipeline, clip: np.ndarray) -> None:
    session = model.encode(clip[:3], frames=12)
    assert (session.frames, session.ask(OVERVIEW.text).frames_encoded) == (12, 3)


def test_eval_sampling_needs_the_rate(model: Pipeline, folder: Path, long: np.ndarray) -> None:
    of_file = model.encode(folder / "long.mp4", frames=6, sampling="eval")
    of_memory = model.encode(long, frames=6, sampling="eval", fps=10)
    assert of_memory.ask(OVERVIEW.text).ids == of_file.ask(OVERVIEW.text).ids
    # Four seconds at two frames per second.
    assert model.encode(long, sampling="eval", fps=10).frames == 8
    assert model.encode(long, sampling="eval", fps=20).frames == 4
    with pytest.raises(InputError, match="rate"):
        model.encode(long, sampling="eval")
    for fps in (0, -1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="fps"):
            model.encode(long, fps=fps)
    with pytest.raises(InputError, match=r"long\.mp4"):
        model.encode(folder / "long.mp4", fps=10)


def test_one_picture_is_asked_about_as_its_file(model: Pipeline, long: np.ndarray, tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    Image.fromarray(long[0]).save(file)
    expected = model.encode(file)
    for picture in (str(file), long[0], Image.open(file), Image.fromarray(long[0])):
        session = model.encode(picture, frames=8)
        assert (session.frames, session.slow_tokens) == (1, expected.slow_tokens)
        assert session.ask(OVERVIEW.text).ids == expected.ask(OVERVIEW.text).ids
    # A list is a clip, however short: its frame is repeated, and pooled.
    assert model.encode([long[0]], frames=8).frames == 8


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK", "turned by EXIF"])
def test_pil_images_become_what_their_files_become(mode: str, model: Pipeline, long: np.ndarray, tmp_path) -> None:
    file, exif = tmp_path / ("picture.jpg" if mode == "CMYK" else "picture.png"), Image.Exif()
    image = Image.fromarray(long[0])
    if mode == "turned by EXIF":
        exif[0x0112] = 6
    else:
        image = image.convert(mode)
    image.save(file, exif=exif)
    with Image.open(file) as opened:
        pixels, _ = model.read_frames(opened, 1, "linspace")
        assert np.array_equal(pixels, model.read_frames([opened], 1, "linspace")[0])
    assert np.array_equal(pixels, model.read_frames(file, 1, "linspace")[0])


def test_frames_may_differ_in_size(model: Pipeline, long: np.ndarray) -> None:
    small = np.asarray(Image.fromarray(long[1]).resize((48, 48)))
    pixels, _ = model.read_frames([long[0], small], 2, "linspace")
    for index, frame in enumerate((long[0], small)):
        assert np.array_equal(pixels[index], model.read_frames(frame, 1, "linspace")[0][0])


def test_frames_that_may_not_be_written_are_taken(model: Pipeline, clip: np.ndarray) -> None:
    frames = clip.copy()
    frames.flags.writeable = False
    assert model.encode(frames).ask(DETAIL.text).answer == DETAIL.answer


# Tensors in a device's memory.


class OnADevice:
    """A tensor as CUDA's are: it says where it is by the DLPack protocol, and nothing reads it but `.cpu()`."""

    def __init__(self, array: np.ndarray, copies: list[tuple[int, ...]]) -> None:
        self._array, self._copies = array, copies
        self.shape, self.dtype = array.shape, array.dtype

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0  # kDLCUDA

    def __dlpack__(self, **_: Any) -> Any:
        raise AssertionError("memory that the CPU cannot read")

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index: int) -> OnADevice:
        return type(self)(self._array[index], self._copies)


class Copyable(OnADevice):
    def cpu(self) -> np.ndarray:
        self._copies.append(self.shape)
        return self._array.copy()


def test_of_a_tensor_on_a_device_the_sampled_frames_are_copied(model: Pipeline, long: np.ndarray) -> None:
    copies: list[tuple[int, ...]] = []
    expected = model.encode(long, frames=4).ask(OVERVIEW.text).ids
    assert model.encode(Copyable(long, copies), frames=4).ask(OVERVIEW.text).ids == expected
    # One more at the beginning, to look at.
    assert copies == [long[0].shape] * 5
    frames = [Copyable(frame, copies) for frame in long]
    assert model.encode(frames, frames=4).ask(OVERVIEW.text).ids == expected


def test_a_device_without_a_way_to_the_cpu_is_refused(model: Pipeline, long: np.ndarray) -> None:
    for video in (OnADevice(long, []), [OnADevice(long[0], [])]):
        with pytest.raises(VideoError, match=r"no \.cpu\(\)") as refused:
            model.encode(video)
        assert_says(refused.value.paragraph(), "uint8", "cupy.asnumpy")


@pytest.mark.gpu
def test_a_cuda_tensor_is_answered_about_as_the_file(model: Pipeline, clip: np.ndarray) -> None:
    if not pytest.importorskip("torch").cuda.is_available():
        pytest.skip("torch sees no CUDA GPU")
    assert model.encode(tensor(clip).cuda()).ask(DETAIL.text).answer == DETAIL.answer
    assert model.encode(list(tensor(clip).cuda())).ask(DETAIL.text).answer == DETAIL.answer


# What is refused.

FRAME = np.zeros((8, 6, 3), np.uint8)
BATCH = np.zeros((4, 8, 6, 3), np.uint8)
REFUSED: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "floats": (lambda: BATCH.astype(np.float32), ("float32 [4, 8, 6, 3]", "uint8 [frames", "0..255")),
    "float frames": (lambda: [FRAME, FRAME / 255], ("Frame 1", "float64 [8, 6, 3]", "0..255")),
    "64-bit integers": (lambda: BATCH.astype(int), ("int64 [4, 8, 6, 3]", "uint8")),
    "signed bytes": (lambda: BATCH.astype(np.int8), ("int8", "expected uint8")),
    "channels first": (lambda: BATCH.transpose(0, 3, 1, 2), ("uint8 [4, 3, 8, 6]", "channels to the end")),
    "float picture, channels first": (
        lambda: (FRAME / 255).transpose(2, 0, 1),
        ("The picture", "float64 [3, 8, 6]", "channels to the end", "0..255"),
    ),
    "four channels": (lambda: np.zeros((4, 8, 6, 4), np.uint8), ("[4, 8, 6, 4]",)),
    "grey": (lambda: BATCH[..., 0], ("uint8 [4, 8, 6]",)),
    "two dimensions": (lambda: FRAME[..., 0], ("uint8 [8, 6]",)),
    "a batch of clips": (lambda: BATCH[None], ("[1, 4, 8, 6, 3]",)),
    "a list of clips": (lambda: [BATCH, BATCH], ("Frame 0", "[4, 8, 6, 3]", "[height, width, 3]")),
    "no frames": (lambda: BATCH[:0], ("[0, 8, 6, 3]",)),
    "no pixels": (lambda: BATCH[:, :0], ("[4, 0, 6, 3]",)),
    "empty list": (list, ("empty",)),
    "generator": (lambda: (frame for frame in BATCH), ("generator", "list(...)")),
    "iterator": (lambda: iter(list(BATCH)), ("iterator", "list(...)")),
    "map": (lambda: map(np.copy, BATCH), ("map", "list(...)")),
    "list of paths": (lambda: ["a.png", "b.png"], ("Frame 0", "str", "PIL.Image.open")),
    "list of numbers": (lambda: [[1, 2, 3]], ("Frame 0", "list")),
    "objects": (lambda: np.array([FRAME, None], object), ("object [2]",)),
    "nothing": (lambda: None, ("NoneType", "Pass a path")),
    "bytes": (lambda: b"\x00\x00\x00\x18ftypmp42", ("bytes", "Pass a path")),
    "dictionary": (lambda: {"frames": BATCH}, ("dict", "Pass a path")),
    "masked array": (lambda: np.ma.masked_array(BATCH, BATCH > 9), ("masked array", "filled(0)")),
    "class": (lambda: np.ndarray, ("type", "Pass a path")),
    "frames of terabytes": (lambda: np.broadcast_to(np.uint8(0), (4, 1, 10**12, 3)), ("1000000000000", "Scale them")),
    "open file": (lambda: io.BufferedReader(io.BytesIO(b"clip")), ("BufferedReader", "Pass a path")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_video_is_refused(name: str, model: Pipeline) -> None:
    make, parts = REFUSED[name]
    with pytest.raises(VideoError) as refused:
        model.encode(make())
    assert_says(refused.value.paragraph(), *parts)


@pytest.mark.parametrize("name", ["bfloat16", "float32 that needs gradients", "channels first", "meta"])
def test_torch_tensors_of_other_kinds_are_refused(name: str, model: Pipeline) -> None:
    torch = pytest.importorskip("torch")
    video, part = {
        "bfloat16": (torch.zeros(4, 8, 6, 3, dtype=torch.bfloat16), "bfloat16 [4, 8, 6, 3]"),
        "float32 that needs gradients": (torch.zeros(4, 8, 6, 3, requires_grad=True), "float32 [4, 8, 6, 3]"),
        "channels first": (torch.zeros(4, 3, 8, 6, dtype=torch.uint8), "Move the channels to the end"),
        "meta": (torch.zeros(4, 8, 6, 3, dtype=torch.uint8, device="meta"), "uint8 [4, 8, 6, 3]"),
    }[name]
    with pytest.raises(VideoError) as refused:
        model.encode(video)
    assert_says(refused.value.paragraph(), part)
    with pytest.raises(VideoError, match="Frame 0 is"):
        model.encode(list(video))


def test_an_animated_image_is_refused_and_its_copies_are_not(model: Pipeline, clip: np.ndarray, tmp_path: Path) -> None:
    file, (first, *rest) = tmp_path / "animated.gif", pictures(clip[:4])
    first.save(file, save_all=True, append_images=rest)
    with Image.open(file) as image:
        for video in (image, list(ImageSequence.Iterator(image))):
            with pytest.raises(VideoError, match="animated GIF") as refused:
                model.encode(video)
            assert "picture.copy()" in refused.value.hint
        copies = [picture.copy() for picture in ImageSequence.Iterator(image)]
    assert model.encode(copies, frames=4).ask(OVERVIEW.text).frames_encoded == 4


def test_a_damaged_pil_image_is_refused_when_it_is_reached(model: Pipeline, long: np.ndarray, tmp_path: Path) -> None:
    file = tmp_path / "cut.png"
    Image.fromarray(long[0]).save(file)
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(VideoError, match="Frame 2 is a PIL image that cannot be read"):
        model.encode([long[0], long[1], Image.open(file)])


# `python -m sfexport`.


@pytest.mark.parametrize("arguments", [("--help",), ("ask", "--help"), ("--version",), ("nonsense",), ("inspect", "?")])
def test_the_module_is_the_same_command_line(arguments: tuple[str, ...]) -> None:
    """But for its name in the usage line."""
    script = Path(sys.executable).with_name("sfexport")
    if not script.exists():
        pytest.skip("the sfexport command is not installed")
    module, command = (
        subprocess.run([*start, *arguments], capture_output=True, text=True)
        for start in ([sys.executable, "-m", "sfexport"], [str(script)])
    )
    assert module.returncode == command.returncode
    assert module.stdout.replace("python -m sfexport", "sfexport") == command.stdout
    assert module.stderr.replace("python -m sfexport", "sfexport") == command.stderr


def test_frame_counts_are_checked_before_anything_is_opened(model: Pipeline) -> None:
    for frames in (0, -1, 1.5, True, "8", 10**30, 10**5000, math.nan, [8], np.float32(3)):
        for call in (model.encode, lambda video, frames: model.read_frames(video, frames, "linspace")):
            with pytest.raises(InputError, match="number of frames"):
                call("/nowhere/clip.mp4", frames)
    with pytest.raises(VideoError, match="no file"):
        model.encode("/nowhere/clip.mp4", frames=np.int64(4))


def test_more_frames_than_the_model_takes_are_refused_unread(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(SHIPPED, tmp_path / "checkpoint")
    config = tmp_path / "checkpoint" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tokenizer_model_max_length": 300}))
    bundle = export(Checkpoint.open(tmp_path / "checkpoint"), tmp_path / "bundle", ExportOptions())
    build(bundle, tmp_path / "engines", "onnxruntime")
    tight, seen = sfexport.load(tmp_path / "engines"), []
    with pytest.raises(InputError, match=r"does not fit: 65536 frames.*the model takes 300"):
        tight.encode(folder / "long.mp4", frames=65_536, on_frames=lambda done, total: seen.append(done))
    assert not seen
    # A picture is one frame, whatever is asked for.
    assert tight.encode(np.zeros((8, 8, 3), np.uint8), frames=65_536).frames == 1


def test_a_folder_and_a_url_are_answered_about_as_the_file(model: Pipeline, folder: Path, tmp_path: Path) -> None:
    with Video.open(folder / "demo.mp4") as video:
        for index, frame in enumerate(video.frames(range(video.info.frame_count))):
            Image.fromarray(frame).save(tmp_path / f"{index}.png")
    pixels, rows = model.read_frames(folder / "demo.mp4", 8, "linspace")
    for same in (tmp_path, (folder / "demo.mp4").as_uri()):
        again, again_rows = model.read_frames(same, 8, "linspace")
        assert np.array_equal(again, pixels) and np.array_equal(again_rows, rows)
    with pytest.raises(InputError, match="rate"):
        model.encode(tmp_path, sampling="eval")
    assert model.encode(tmp_path, sampling="eval", fps=2, frames=4).frames == 4


# Every verb as a function.


def test_a_model_goes_the_whole_way_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Export, build, load, ask and parity, with default places, and no Click."""
    code = f"""
import sys
import sfexport
steps = []
bundle = sfexport.export({str(SHIPPED)!r}, on_step=steps.append)
engines = sfexport.build(bundle.path, backend="onnxruntime", on_step=steps.append)
answer = sfexport.load(engines.path).encode({str(tmp_path / "clip.mp4")!r}).ask({DETAIL.text!r}).answer
document = sfexport.inspect(str(engines.path))
assert "click" not in sys.modules
print([bundle.path.name, str(engines.path), answer, document["kind"], len(steps)])
"""
    write_frames(tmp_path / "clip.mp4", video_frames(*CLIP), FPS, (SIZE * UPSCALE, SIZE * UPSCALE))
    monkeypatch.chdir(tmp_path)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    bundle, engines, answer, kind, steps = ast.literal_eval(run.stdout)
    assert (bundle, answer, kind) == ("model-bundle", DETAIL.answer, "engines")
    assert engines.startswith("model-bundle-engines/cpu-onnxruntime-")
    assert steps >= 7


def test_parity_takes_a_directory_or_a_loaded_model(folder: Path, model: Pipeline) -> None:
    pytest.importorskip("torch")
    reports = [sfexport.parity(which, folder / "demo.mp4", max_new_tokens=2) for which in (folder / "engines", model)]
    assert all(report.passed for report in reports)
    assert reports[0].to_json() == reports[1].to_json()
    assert not sfexport.parity(model, max_new_tokens=1, atol=0.0, rtol=0.0).passed


def test_plan_and_diagnose_return_what_their_commands_print() -> None:
    planned = sfexport.plan(SHIPPED, "jetson-orin-agx-64", frames=32).to_json()
    printed = document(run_command("plan", SHIPPED, "--target", "jetson-orin-agx-64", "--frames", 32, "--json"))
    assert json.loads(json.dumps(planned)) == printed
    printed = json.loads(run_command("doctor", "--target", "h100", "--json").stdout)
    diagnosed = json.loads(json.dumps(sfexport.diagnose("h100").to_json()))
    for line in (*printed["lines"], *diagnosed["lines"]):
        if line["name"] in ("memory", "disk"):  # other programs change what is free
            line["seen"] = ""
    assert diagnosed == printed


def test_a_check_without_a_target_is_refused() -> None:
    with pytest.raises(InputError, match="target"):
        sfexport.check_build(SHIPPED, target=None)


def test_help_shows_the_functions() -> None:
    page = pydoc.render_doc(sfexport, renderer=pydoc.plaintext)
    for name in ("build", "check_build", "diagnose", "export", "inspect", "load", "parity", "plan"):
        assert f"\n    {name}(" in page
    with pytest.raises(AttributeError, match="no attribute 'exprot'"):
        _ = sfexport.exprot
