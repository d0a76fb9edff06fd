"""Frames in memory as a video: NumPy arrays, PIL images, DLPack tensors, and lists of these.

The libraries that own DLPack tensors (torch, CuPy, JAX) are not imported: the protocol is enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sfexport.errors import VideoError
from sfexport.video.files import VideoInfo, check_rate
from sfexport.video.pictures import DAMAGE, rgb_pixels

WHAT_WORKS = (
    "Pass a path, an array uint8 [frames, height, width, 3], a list of arrays [height, width, 3] or of PIL images, "
    "or a tensor with __dlpack__."
)
IN_MEMORY = Path("<frames in memory>")
# Of one frame. A larger one is a mistake, for instance in the order of dimensions, and would fill the memory.
MOST_PIXELS = 1 << 28
# DLPack's device types whose memory the CPU reads: CPU, CUDA's and ROCm's pinned memory, CUDA's managed memory.
READABLE_DEVICES = (1, 3, 11, 13)


class MemoryFrames:
    """A source for `Video` of frames in memory, which copies only the frames that are asked for.

    An array or tensor [T, H, W, 3] and a list are clips, however short; one [H, W, 3] or one PIL image is a picture.
    PIL images are turned upright by their EXIF tag and made RGB, as those read from files are.
    """

    def __init__(self, video: Any, fps: float | None = None) -> None:
        """Check the frames' types and shapes, and read the first frame.

        Args:
            video: see WHAT_WORKS; everything uint8 RGB. A tensor on a GPU needs `.cpu()`, which is called for each
                frame that is asked for.
            fps: frames per second; None: unknown, and `info.fps` is NaN.

        Raises:
            VideoError: `video` is not frames in memory.
            InputError: `fps` is not a positive number.
        """
        check_rate(fps)
        self._frames, is_picture = _frames_of(video)
        # Read in the caller's thread: the copy from a GPU waits for the work that makes the frames.
        height, width, _ = self.frame(0).shape
        count, rate = len(self._frames), 1.0 if is_picture else fps or math.nan
        seconds = 0.0 if is_picture or fps is None else count / fps
        self.info = VideoInfo(IN_MEMORY, count, rate, width, height, seconds, 0, is_picture)
        self.frames_decoded = 0

    def frame(self, index: int) -> np.ndarray:
        """Return the frame at this position, uint8 RGB [height, width, 3].

        Raises:
            VideoError: the frame cannot be read, for instance because a picture's file is damaged.
        """
        frame, name = self._frames[index], f"Frame {index}"
        pixels = _rgb(frame, name) if isinstance(frame, Image.Image) else _to_cpu(frame, name)
        _check(pixels, name, dimensions=3)
        return np.ascontiguousarray(pixels)

    def close(self) -> None:
        """Nothing is held open."""


def _frames_of(video: Any) -> tuple[Any, bool]:
    """Return a sequence of frames, and whether it is one picture."""
    if isinstance(video, Image.Image):
        return [_taken(video, "The picture")], True
    if _is_tensor(video):
        tensor = _readable(video, "The video")
        if len(tensor.shape) == 3:
            return [_taken(tensor, "The picture")], True
        _check(tensor, "The video", dimensions=4)
        return tensor, False
    if hasattr(video, "__next__") and not hasattr(video, "read"):
        raise VideoError(
            f"A {type(video).__name__} gives frames one after the other, and frames are chosen by their number.",
            "Pass list(...) of it.",
        )
    if not isinstance(video, Sequence) or isinstance(video, (bytes, bytearray, memoryview)):
        raise VideoError(f"A video cannot be taken from a {type(video).__name__}.", WHAT_WORKS)
    if not video:
        raise VideoError("The list of frames is empty.", WHAT_WORKS)
    return [_taken(frame, f"Frame {index}") for index, frame in enumerate(video)], False


def _taken(frame: Any, name: str) -> Any:
    """Check one frame: return a PIL image, or a tensor of the right type and shape."""
    if isinstance(frame, Image.Image):
        _refuse_animation(frame, name)
        return frame
    if not _is_tensor(frame):
        hint = "PIL.Image.open reads pictures from files." if isinstance(frame, (str, Path)) else WHAT_WORKS
        raise VideoError(f"{name} is a {type(frame).__name__}, not an array or a PIL image.", hint)
    tensor = _readable(frame, name)
    _check(tensor, name, dimensions=3)
    return tensor


def _is_tensor(value: Any) -> bool:
    if isinstance(value, type):
        return False
    return isinstance(value, np.ndarray) or (hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__"))


def _readable(tensor: Any, name: str) -> Any:
    """Return an array that shares the tensor's memory; or the tensor itself if `.cpu()` can copy it from a device."""
    if isinstance(tensor, np.ndarray):
        return tensor
    try:
        device, _ = tensor.__dlpack_device__()
        if device in READABLE_DEVICES:
            return np.from_dlpack(tensor)
    except (AttributeError, BufferError, RuntimeError, TypeError, ValueError) as error:
        # NumPy has no bfloat16, torch shares no tensor that needs gradients, and so on.
        raise VideoError(f"{name} is {_describe(tensor)}, which cannot be read: {error}", WHAT_WORKS) from error
    if not hasattr(tensor, "cpu"):
        raise VideoError(
            f"{name} is {_describe(tensor)} in a device's memory, and its type has no .cpu() to copy it.",
            "Copy it to the CPU first, for instance with cupy.asnumpy or jax.device_get.",
        )
    return tensor


def _to_cpu(frame: Any, name: str) -> np.ndarray:
    if isinstance(frame, np.ndarray):
        return frame
    pixels: np.ndarray = _readable(frame.cpu(), name)
    return pixels


def _dtype(tensor: Any) -> str:
    """Return the dtype's name without the library's: 'uint8' for torch.uint8."""
    return str(getattr(tensor, "dtype", "of unknown type")).rpartition(".")[2]


def _describe(tensor: Any) -> str:
    return f"{_dtype(tensor)} {list(getattr(tensor, 'shape', ()))}"


def _check(tensor: Any, name: str, dimensions: int) -> None:
    """Raise VideoError unless the tensor is uint8 [height, width, 3], or [frames, height, width, 3] of 4 dimensions."""
    dtype, shape = _dtype(tensor), tuple(tensor.shape)
    if isinstance(tensor, np.ma.MaskedArray):
        raise VideoError(f"{name} is a masked array, whose mask would not be seen.", "Pass array.filled(0).")
    if len(shape) >= 3 and math.prod(shape[-3:-1]) > MOST_PIXELS:
        raise VideoError(
            f"{name} has frames of {shape[-3]} x {shape[-2]} pixels, more than {MOST_PIXELS:,}.",
            "Scale them down first.",
        )
    if dtype == "uint8" and len(shape) == dimensions and shape[-1] == 3 and math.prod(shape):
        return
    hints = []
    if len(shape) >= 3 and shape[-3] == 3 and shape[-1] != 3:
        hints.append("Move the channels to the end.")
    if "float" in dtype:
        hints.append("Scale the values to 0..255 and convert them to uint8.")
    layout = "[frames, height, width, 3]" if dimensions == 4 else "[height, width, 3]"
    raise VideoError(f"{name} is {_describe(tensor)}; expected uint8 {layout}, RGB.", " ".join(hints) or WHAT_WORKS)


def _refuse_animation(image: Image.Image, name: str) -> None:
    """Raise VideoError for an animation: all items of PIL.ImageSequence are one image, at one position."""
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise VideoError(
            f"{name} is an animated {image.format} image, which shows one of its pictures at a time.",
            "Pass its path, or [picture.copy() for picture in PIL.ImageSequence.Iterator(image)].",
        )


def _rgb(image: Image.Image, name: str) -> np.ndarray:
    try:
        return rgb_pixels(image, name)
    except DAMAGE as error:
        raise VideoError(f"{name} is a PIL image that cannot be read: {error}.", "Save or copy it again.") from error
