"""Check a video's path and file before it is decoded, and describe an open clip."""

from __future__ import annotations

import os
import re
import shutil
import stat
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from sfexport.errors import InputError, VideoError

STANDARD_INPUT = "-"
STDIN_LIMIT = 16 * 2**30  # bytes; an endless stream must not fill the disk
# A Path turns two slashes into one. One letter alone is a drive of Windows.
URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(//?)(.*)", re.DOTALL)


@dataclass(frozen=True)
class VideoInfo:
    """Properties of an open clip.

    Attributes:
        frame_count: number of frames, at least 1.
        fps: average frames per second, positive; 1.0 for a picture; NaN for frames in memory of unknown rate.
        width: pixels of a frame as displayed, that is after `rotation`.
        height: pixels of a frame as displayed.
        duration_seconds: time from the first frame's start to the last one's end; 0.0 for a picture.
        rotation: clockwise degrees by which frames are turned to stand upright: 0, 90, 180 or 270.
        is_picture: True for a still picture, False for a clip, even of one frame.
    """

    path: Path
    frame_count: int
    fps: float
    width: int
    height: int
    duration_seconds: float
    rotation: int
    is_picture: bool = False


def local_path(video: str | os.PathLike[str]) -> Path:
    """Return the local path of a path or a file:// URL.

    Raises:
        VideoError: it is a URL of another kind or machine, or a path that no file can have.
    """
    text = os.fsdecode(video)
    if not text:
        raise VideoError("The video's path is empty.", "Name a file.")
    if "\0" in text:
        raise VideoError(f"{text!r} is not a path: it contains a zero byte.", "Check the path.")
    url = URL.fullmatch(text)
    if url is None or os.path.lexists(text):
        return Path(text)
    scheme, slashes, rest = url.groups()
    if scheme.lower() != "file":
        # With one slash, a folder named like a protocol may be meant.
        if len(slashes) == 1 and os.path.isdir(f"{scheme}:"):
            return Path(text)
        shown = text if len(slashes) == 2 else f"{scheme}://{rest}"
        raise VideoError(
            f"'{shown}' is a URL, and sfexport works offline: it opens local files only.",
            "Download the video first and pass the file's path.",
        )
    path = _path_of_file_url(rest, has_host=len(slashes) == 2)
    if path is None:
        raise VideoError(f"'{text}' names a file on another machine.", "Copy it here, or write file:///PATH.")
    return path


def _path_of_file_url(rest: str, has_host: bool) -> Path | None:
    """Return the path of the text after 'file:/' or, with a host (usually empty), 'file://'."""
    if not has_host:
        return Path("/" + unquote(rest))
    host, slash, path = rest.partition("/")
    return Path("/" + unquote(path)) if slash and host.lower() in ("", "localhost") else None


def spool_standard_input() -> Path:
    """Copy standard input to a temporary file, which the caller deletes.

    Raises:
        VideoError: nothing is piped in, the stream is endless, or it does not fit on the disk.
    """
    source = getattr(sys.stdin, "buffer", None)
    if source is None or sys.stdin.isatty():
        raise VideoError("'-' reads a video from standard input, and none is piped in.", "Pipe one, or name a file.")
    descriptor, name = tempfile.mkstemp(prefix="sfexport-stdin-")
    path = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            while block := source.read(1 << 20):
                file.write(block)
                if file.tell() > STDIN_LIMIT:
                    raise VideoError(
                        f"Standard input gives more than {STDIN_LIMIT >> 30} GiB.", "Save it to a file and name that."
                    )
        if not path.stat().st_size:
            raise VideoError("Standard input is empty.", "Pipe a video in, or name a file.")
        return path
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            free = shutil.disk_usage(path.parent).free / 1e9
            raise VideoError(
                f"Standard input cannot be copied to {path.parent} ({error.strerror}; {free:.1f} GB are free).",
                "Save the video to a file and name that.",
            ) from error
        raise


def check_rate(fps: float | None) -> None:
    """Raise InputError for a rate that is neither None nor a positive number."""
    is_number = isinstance(fps, (int, float)) and not isinstance(fps, bool)
    if fps is not None and not (is_number and 0 < fps <= sys.float_info.max):
        raise InputError(f"fps is {fps!r}; it must be a positive number of frames per second.", "Pass fps=25.")


def check_file(path: Path) -> None:
    """Check that a path is a readable regular file that is not empty; its type is checked before it is opened.

    Raises:
        VideoError: it is not, and the message says why.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise VideoError(f"There is no file '{path}'.", "Check the path.") from error
    except OSError as error:  # a name that is too long, a loop of links, a directory that may not be entered
        raise VideoError(f"'{path}' cannot be read: {error.strerror}.", "Check the path.") from error
    if stat.S_ISDIR(mode):
        raise VideoError(f"'{path}' is a directory, not a video.", "Name a file in it.")
    if not stat.S_ISREG(mode):
        raise VideoError(f"'{path}' is not a regular file.", "Save the video to a file first.")
    try:
        with path.open("rb") as file:
            is_empty = not file.read(1)
    except OSError as error:
        raise VideoError(f"'{path}' cannot be read: {error.strerror}.", "Check its permissions.") from error
    if is_empty:
        raise VideoError(f"'{path}' is empty.", "Copy or download it again.")
