"""Read a folder of pictures as a clip, the form in which many data sets keep videos."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np

from sfexport.errors import VideoError
from sfexport.video.files import VideoInfo, check_file, check_rate
from sfexport.video.pictures import EXIF_ORIENTATION, Orientation, Still, identify, open_picture

NOTES_OF_SYSTEMS = ("thumbs.db", "desktop.ini")
FOLDER_HINT = "A folder is taken as a clip if it holds its frames and nothing else; else name a file in it."


class FrameFolder:
    """The pictures of a folder in the order of their names, numbers by their value (frame_2 before frame_10).

    Hidden files are ignored.
    """

    def __init__(self, path: Path, fps: float | None = None) -> None:
        """Read the beginning of every file.

        Args:
            fps: frames per second; None: unknown, and `info.fps` is NaN.

        Raises:
            VideoError: a file is not a picture, a picture has another size, or there is none.
            InputError: `fps` is not a positive number.
        """
        check_rate(fps)
        self.frames_decoded = 0
        self._files, self._at, self._pixels = _frame_files(path), -1, np.empty(0)
        width, height = size = _upright_size(self._files[0])
        for file in self._files[1:]:
            other = _upright_size(file)
            if other != size:
                raise VideoError(
                    f"'{file}' has {other[0]}x{other[1]} pixels, and '{self._files[0].name}' {width}x{height}: frames "
                    "of one clip have one size.",
                    FOLDER_HINT,
                )
        count = len(self._files)
        seconds = count / fps if fps else 0.0
        self.info = VideoInfo(path, count, fps or math.nan, width, height, seconds, 0)

    def frame(self, index: int) -> np.ndarray:
        if index != self._at:
            self._pixels = _read(self._files[index])
            self._at = index
            self.frames_decoded += 1
        return self._pixels

    def close(self) -> None:
        """Nothing is held open."""


def _frame_files(folder: Path) -> list[Path]:
    try:
        files = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except OSError as error:
        raise VideoError(f"'{folder}' cannot be read: {error.strerror}.", "Check its permissions.") from error
    files = [file for file in files if file.name.lower() not in NOTES_OF_SYSTEMS]
    if not files:
        raise VideoError(f"'{folder}' is a directory without pictures.", FOLDER_HINT)
    files.sort(key=_by_number)
    return files


def _by_number(file: Path) -> tuple[list[tuple[int, int, str]], str]:
    parts = re.split(r"(\d+)", file.name)
    return [(1, int(part), "") if i % 2 else (0, 0, part) for i, part in enumerate(parts)], file.name


def _upright_size(file: Path) -> tuple[int, int]:
    if file.is_dir():
        raise VideoError(f"'{file.parent}' is a directory with a directory in it, '{file.name}'.", FOLDER_HINT)
    check_file(file)
    image = identify(file, file)
    if image is None:
        raise VideoError(f"'{file}', in the directory '{file.parent}', is not a picture.", FOLDER_HINT)
    with image:
        # Pillow turns TIFF upright itself.
        tag = 1 if image.format == "TIFF" else image.getexif().get(EXIF_ORIENTATION, 1)
        return Orientation.from_exif(tag).size(*image.size)


def _read(file: Path) -> np.ndarray:
    picture = open_picture(file)
    if not isinstance(picture, Still):
        raise VideoError(f"'{file}' is not one picture: it holds several.", FOLDER_HINT)
    return picture.frame(0)
