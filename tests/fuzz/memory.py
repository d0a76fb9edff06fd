"""Kinds of frames in memory: arrays, lists, images and tensors through DLPack, of right and of wrong types."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import sfexport
from fuzz.base import ENGINES, FRAMES
from fuzz.kinds import Case, Expect, Kind, Wrong, call

REFUSED, ANSWERED, EITHER = Expect.REFUSED, Expect.ANSWERED, Expect.EITHER


def _strided(by: tuple[slice, ...]) -> np.ndarray:
    """FRAMES as a view into a larger array."""
    big = np.zeros([s * 2 for s in FRAMES.shape], np.uint8)
    big[by] = FRAMES
    return big[by]


class _Dlpack:
    """A tensor of another library, as the protocol shows it."""

    def __init__(self, array: np.ndarray, device: tuple[int, int] = (1, 0)) -> None:
        self.array, self.device, self.dtype, self.shape = array, device, array.dtype, array.shape

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __getitem__(self, index: int) -> Any:
        return _Dlpack(self.array[index], self.device)

    def __len__(self) -> int:
        return len(self.array)


class _Liar(_Dlpack):
    """Says what it is and gives something else."""

    def __dlpack__(self, **options: Any) -> Any:
        raise RuntimeError("\x1b[31mno\x1b[0m")


class _BadDevice(_Dlpack):
    def __dlpack_device__(self) -> Any:
        return "cuda"


# The same frames in another form: the same pixels.
SAME: dict[str, Callable[[], Any]] = {
    "a view with steps": lambda: _strided(tuple(slice(None, None, 2) for _ in range(4))),
    "a view from the middle": lambda: _strided(tuple(slice(1, 1 + s) for s in FRAMES.shape)),
    "Fortran order": lambda: np.asfortranarray(FRAMES),
    "reversed twice": lambda: FRAMES[::-1].copy()[::-1],
    "mirrored twice": lambda: FRAMES[:, :, ::-1].copy()[:, :, ::-1],
    "channels first, moved back": lambda: np.ascontiguousarray(FRAMES.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1),
    "read-only": lambda: _read_only(FRAMES.copy()),
    "a list of arrays": lambda: list(FRAMES),
    "a tuple of arrays": lambda: tuple(FRAMES),
    "a list of images": lambda: [Image.fromarray(frame) for frame in FRAMES],
    "arrays and images mixed": lambda: [FRAMES[0], Image.fromarray(FRAMES[1]), *FRAMES[2:]],
    "DLPack": lambda: _Dlpack(FRAMES.copy()),
    "a subclass of ndarray": lambda: FRAMES.view(type("A", (np.ndarray,), {})),
    "a mapped file": lambda: _mapped(),
    "images in RGBA": lambda: [Image.fromarray(frame).convert("RGBA") for frame in FRAMES],
}
# No uint8 RGB frames: refused. What could be meant by them is for the caller to say.
WRONG: dict[str, Callable[[], Any]] = {
    "float32 in 0..1": lambda: (FRAMES / 255).astype(np.float32),
    "float64": lambda: FRAMES.astype(np.float64),
    "float16": lambda: FRAMES.astype(np.float16),
    "NaN": lambda: np.full(FRAMES.shape, np.nan, np.float32),
    "int8": lambda: FRAMES.astype(np.int8),
    "uint16": lambda: FRAMES.astype(np.uint16),
    "int64": lambda: FRAMES.astype(np.int64),
    "bool": lambda: FRAMES > 100,
    "complex": lambda: FRAMES.astype(np.complex64),
    "objects": lambda: FRAMES.astype(object),
    "text": lambda: FRAMES.astype(str),
    "structured": lambda: np.zeros(4, [("r", "u1"), ("g", "u1"), ("b", "u1")]),
    "dates": lambda: FRAMES.astype("datetime64[s]"),
    "channels first": lambda: FRAMES.transpose(0, 3, 1, 2),
    "four channels": lambda: np.concatenate([FRAMES, FRAMES[..., :1]], 3),
    "one channel": lambda: FRAMES[..., :1],
    "no channels": lambda: FRAMES[..., 0],
    "no frames": lambda: FRAMES[:0],
    "no rows": lambda: FRAMES[:, :0],
    "no columns": lambda: FRAMES[:, :, :0],
    "five dimensions": lambda: FRAMES[None],
    "one dimension": lambda: FRAMES.ravel(),
    "no dimensions": lambda: np.uint8(5),
    "an empty list": list,
    "a list of nothing": lambda: [None],
    "a list of lists": lambda: FRAMES.tolist(),
    "a list with one bad frame": lambda: [*FRAMES[:3], FRAMES[3].astype(np.float32)],
    "a list with one grey frame": lambda: [*FRAMES[:3], FRAMES[3, ..., 0]],
    "a list that holds itself": lambda: _recursive(),
    "a generator": lambda: (frame for frame in FRAMES),
    "a dictionary": lambda: {"video": FRAMES},
    "a set": lambda: {1, 2},
    "bytes": FRAMES.tobytes,
    "a memory view": lambda: memoryview(FRAMES),
    "a number": lambda: 7,
    "None": lambda: None,
    "a function": lambda: len,
    "a list of paths": lambda: ["a.png", Path("b.png")],
    "DLPack that raises": lambda: _Liar(FRAMES.copy()),
    "DLPack on an unknown device": lambda: _Dlpack(FRAMES.copy(), (99, 0)),
    "DLPack whose device is a text": lambda: _BadDevice(FRAMES.copy()),
    "DLPack of float32": lambda: _Dlpack(FRAMES.astype(np.float32)),
    "a masked array": lambda: np.ma.masked_array(FRAMES, FRAMES > 5),
    "another byte order": lambda: FRAMES.astype(">u2"),
    "an open file": lambda: io.BytesIO(b"frames"),
    "a class": lambda: np.ndarray,
    "frames of 1 x 10^12 pixels": lambda: np.broadcast_to(np.uint8(0), (4, 1, 10**12, 3)),
    "10^12 frames": lambda: np.broadcast_to(np.uint8(0), (10**12, 8, 8, 3))[:, :, :, :2],
}
# Taken if it can be, in little memory.
ODD: dict[str, Callable[[], Any]] = {
    "10^12 frames of the same memory": lambda: np.broadcast_to(np.uint8(7), (10**12, 64, 64, 3)),
    "frames of different sizes": lambda: [FRAMES[0], FRAMES[1][:30], FRAMES[2][:, :20], FRAMES[3]],
    "frames of 1 x 1": lambda: FRAMES[:, :1, :1],
    "frames of 1 x 3000": lambda: np.broadcast_to(np.uint8(7), (4, 1, 3000, 3)),
    "one frame of a clip": lambda: FRAMES[:1],
    "a picture": lambda: FRAMES[0],
    "images of 16 bits": lambda: [Image.fromarray(np.full((32, 32), 40_000, np.uint16))] * 4,
    "images in CMYK": lambda: [Image.new("CMYK", (32, 32))] * 4,
    "images in palette": lambda: [Image.new("P", (32, 32))] * 4,
    "a closed image": lambda: [_closed()] * 4,
    "a text that is a path": lambda: "nowhere.mp4",
    "an mmap": lambda: _mapped().base,
}


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def _recursive() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


def _closed() -> Image.Image:
    image = Image.new("RGB", (8, 8))
    image.close()
    return image


def _mapped() -> np.ndarray:
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        mapped = np.memmap(file.name, np.uint8, "w+", shape=FRAMES.shape)
        mapped[:] = FRAMES
        return mapped


def _pixels(case: Case, frames: Any) -> np.ndarray:
    pipeline = call(sfexport.load, case.base / ENGINES)
    pixels, rows = call(pipeline.read_frames, frames, len(FRAMES), "linspace")
    return pixels[rows]


def _same(case: Case, make: Callable[[], Any]) -> None:
    if not np.array_equal(_pixels(case, make()), _pixels(case, FRAMES)):
        raise Wrong("other pixels than those of the plain array")


def _encode(case: Case, make: Callable[[], Any], **options: Any) -> None:
    pipeline = call(sfexport.load, case.base / ENGINES)
    session = call(pipeline.encode, make(), 4, **options)
    if not call(session.ask, "What?", max_new_tokens=1).ids:
        raise Wrong("no token")


def _kinds() -> Iterator[Kind]:
    for name, make in SAME.items():
        yield Kind(f"in memory, {name}", "memory", partial(_same, make=make), ANSWERED)
    for name, make in WRONG.items():
        yield Kind(f"in memory, {name}", "memory", partial(_encode, make=make), REFUSED, timeout=30)
    for name, make in ODD.items():
        yield Kind(f"in memory, {name}", "memory", partial(_encode, make=make), EITHER, timeout=30)


KINDS = [*_kinds()]
