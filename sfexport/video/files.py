"""What a file is before any decoder sees it: checks with clear refusals, and the facts of a clip.

Imports the standard library and sfexport.errors only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sfexport.errors import VideoError


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a clip once it is open.

    Attributes:
        frame_count: frames that can be asked for, at least 1.
        fps: average frames per second, positive; 1.0 for a picture; not a number for frames in memory of unknown rate.
        width, height: pixels of a frame as displayed, that is after `rotation`.
        duration_seconds: from the first frame's start to the last one's end; 0.0 for a picture.
        rotation: clockwise degrees by which frames are turned to stand upright: 0, 90, 180 or 270.
        is_picture: a still picture, not a clip that happens to have one frame.
    """

    path: Path
    frame_count: int
    fps: float
    width: int
    height: int
    duration_seconds: float
    rotation: int
    is_picture: bool = False


def check_file(path: Path) -> None:
    """Refuse what is no readable file with something in it.

    Raises:
        VideoError: saying which it is.
    """
    if path.is_dir():
        raise VideoError(f"'{path}' is a directory, not a video.", "Name a file in it.")
    if not path.exists():
        raise VideoError(f"There is no file '{path}'.", "Check the path.")
    if not path.is_file():
        raise VideoError(f"'{path}' is not a regular file.", "Save the video to a file first.")
    try:
        with path.open("rb") as file:
            is_empty = not file.read(1)
    except OSError as error:
        raise VideoError(f"'{path}' cannot be read: {error.strerror}.", "Check its permissions.") from error
    if is_empty:
        raise VideoError(f"'{path}' is empty.", "Copy or download it again.")
