"""Turn RGB frames into the tower's pixels, bit for bit as transformers' CLIPImageProcessor does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from sfexport.checkpoint.image_processor import ImageProcessorConfig
from sfexport.errors import InputError
from sfexport.video.resampling import resized_window

WHOLE_STRIPS = 4  # frames up to this many times as long as wide are resized whole, which Pillow does faster


def preprocess(frames: Sequence[np.ndarray], image: ImageProcessorConfig) -> np.ndarray:
    """Resize (bicubic, antialiased), crop and normalise.

    Args:
        frames: uint8 RGB arrays [H, W, 3]; sizes may differ.
        image: the tower's sizes, mean and deviation.

    Returns:
        float32 [len(frames), 3, crop, crop].

    Raises:
        InputError: a frame is not uint8 [H, W, 3], or is empty.
    """
    pixels = np.empty((len(frames), 3, image.crop, image.crop), np.float32)
    table = _normalised_values(image)
    for i, frame in enumerate(frames):
        _check_frame(frame)
        square = _shape(frame, image)
        for channel in range(3):
            np.take(table[channel], square[:, :, channel], out=pixels[i, channel])
    return pixels


def _check_frame(frame: np.ndarray) -> None:
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or not frame.size:
        raise InputError(f"A frame is {frame.dtype} {list(frame.shape)}; expected uint8 [height, width, 3].")


def _normalised_values(image: ImageProcessorConfig) -> np.ndarray:
    """Return a table, float32 [3, 256], of the normalised value of each byte in each channel.

    It is rounded as in the image processor: 1/255 in float64, stored as float32, then mean and deviation in float32.
    The table saves a float64 copy of every frame.
    """
    values = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    mean, std = (np.array(v, np.float32)[:, None] for v in (image.mean, image.std))
    return (values - mean) / std


def _shape(frame: np.ndarray, image: ImageProcessorConfig) -> np.ndarray:
    """Resize and crop one frame to uint8 [crop, crop, 3]."""
    if not image.keep_aspect:
        return _resize(frame, image.crop, image.crop)
    height, width = frame.shape[:2]
    short = min(height, width)
    # The short side must come out as `size` itself; size * short / short is exact.
    target = int(image.size * height / short), int(image.size * width / short)
    if max(target) > WHOLE_STRIPS * max(image.size, image.crop):
        # Only the part that the crop keeps is computed.
        shape = min(target[0], image.crop), min(target[1], image.crop)
        offset = (target[0] - shape[0]) // 2, (target[1] - shape[1]) // 2
        return _centre_crop(resized_window(frame, target, offset, shape), image.crop)
    return _centre_crop(_resize(frame, *target), image.crop)


def _resize(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    if frame.shape[:2] == (height, width):
        return frame
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))


def _centre_crop(frame: np.ndarray, crop: int) -> np.ndarray:
    """Return the middle crop x crop pixels; a shorter side is padded with black, as in the image processor."""
    height, width = frame.shape[:2]
    if height < crop or width < crop:
        frame = _pad(frame, max(height, crop), max(width, crop))
        height, width = frame.shape[:2]
    top, left = (height - crop) // 2, (width - crop) // 2
    return frame[top : top + crop, left : left + crop]


def _pad(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    padded = np.zeros((height, width, 3), np.uint8)
    # Rounded up, unlike the crop's offset, as in the image processor.
    top, left = (-(-(a - b) // 2) for a, b in ((height, frame.shape[0]), (width, frame.shape[1])))
    padded[top : top + frame.shape[0], left : left + frame.shape[1]] = frame
    return padded
