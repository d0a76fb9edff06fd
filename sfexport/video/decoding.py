"""Open a clip, a picture or a folder of pictures, and get chosen frames of it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from sfexport.errors import InputError, VideoError
from sfexport.video.clip import Clip
from sfexport.video.files import STANDARD_INPUT, VideoInfo, check_file, local_path, spool_standard_input
from sfexport.video.folder import FrameFolder
from sfexport.video.pictures import AnimatedPicture, open_picture
from sfexport.video.sampling import check_seek_mode

DECODERS = ("pyav", "gstreamer")


class FrameSource(Protocol):
    """A source of frames for `Video`: a clip, a picture, an animated picture, a folder, frames in memory."""

    info: VideoInfo

    @property
    def frames_decoded(self) -> int: ...

    def frame(self, index: int) -> np.ndarray: ...

    def close(self) -> None: ...


@runtime_checkable
class TimedSource(Protocol):
    """A source that knows its frames' times."""

    def times(self, indices: Sequence[int]) -> list[float]: ...


class Video:
    """A clip, or a still picture as a clip of one frame; open it with `Video.open`, in a `with` statement.

    Only one thread at a time may use it.
    """

    def __init__(self, source: FrameSource, spooled: Path | None = None) -> None:
        """Wrap a source; `spooled` is a temporary file that `close` deletes."""
        self._source, self._spooled = source, spooled

    @classmethod
    def open(cls, video: str | os.PathLike[str], fps: float | None = None, decoder: str = "pyav") -> Video:
        """Open a file, list its frames and decode the first one.

        Args:
            video: a path; a file:// URL; '-' for a file on standard input; a folder of pictures, which are its
                frames in the order of their names (numbers by value).
            fps: frames per second, for a folder alone; None: unknown.
            decoder: 'pyav' or, for clips, 'gstreamer', which uses a board's hardware decoder.

        Raises:
            VideoError: there is no such file, it holds no video, or the video cannot be decoded.
            InputError: `fps` is given for a file, which has its own rate; or there is no such decoder, or not for this.
            MissingDependency: GStreamer's Python bindings are not there.
        """
        check_decoder(decoder)
        if os.fsdecode(video) == STANDARD_INPUT:
            spooled = spool_standard_input()
            try:
                return cls(_open_file(spooled, Path(STANDARD_INPUT), fps, decoder), spooled)
            except BaseException:
                spooled.unlink(missing_ok=True)
                raise
        path = local_path(video)
        if os.path.isdir(path):
            check_decoder(decoder, f"'{path}'")
            return cls(FrameFolder(path, fps))
        return cls(_open_file(path, path, fps, decoder))

    @property
    def info(self) -> VideoInfo:
        return self._source.info

    @property
    def frames_decoded(self) -> int:
        """Number of frames decoded so far, including those that nobody asked for."""
        return self._source.frames_decoded

    def nearest_keyframes(self, indices: Sequence[int]) -> list[int]:
        """Return for each frame index the keyframe that is nearest in time, of two as near ones the earlier.

        Of a clip whose frames have no times, the nearest by number. A keyframe that is the nearest one of several
        frames is repeated.

        Raises:
            InputError: this is no video file that PyAV decodes: a picture, a folder of pictures, or frames in memory.
            VideoError: the file does not tell which frames are keyframes, or an index is out of range.
        """
        self._check(indices)
        if isinstance(self._source, TimedSource) and not isinstance(self._source, Clip):
            raise InputError(
                f"'{self.info.path}': --seek keyframe is not for --decoder gstreamer, which decodes every frame.",
                "Leave out one of the two.",
            )
        if not isinstance(self._source, Clip) or self.info.is_picture:
            raise InputError(
                f"'{self.info.path}' has no keyframes to seek: it is a picture, a folder of pictures or frames in "
                "memory, and not a video file.",
                "Leave out --seek keyframe (in Python, seek='keyframe').",
            )
        return self._source.nearest_keyframes(indices)

    def times(self, indices: Sequence[int]) -> list[float] | None:
        """Return the times of frames, in seconds after the first one's; None: unknown.

        They are the file's presentation times; where there are none, the frames' numbers by `info.fps`.
        """
        self._check(indices)
        if isinstance(self._source, TimedSource):
            return self._source.times(indices)
        if isinstance(self._source, AnimatedPicture) or math.isnan(self.info.fps):
            return None
        return [index / self.info.fps for index in indices]

    def frames(self, indices: Sequence[int], seek: str = "exact") -> Iterator[np.ndarray]:
        """Yield the frames of these indices: uint8 RGB [height, width, 3], upright, contiguous.

        An index is a position in presentation order, 0..frame_count-1. Non-decreasing indices are decoded in one
        pass, with jumps over frames that are not needed; a smaller index after a larger one costs a jump back. A
        repeated index yields the same array again: copy it before changing it.

        Args:
            seek: 'exact': the frames of these indices; 'keyframe': their nearest keyframes, each decoded without any
                other frame. A keyframe that its decoder does not give alone is decoded from an earlier one.

        Raises:
            InputError: as `nearest_keyframes`; or there is no such way of seeking.
            VideoError: an index is out of range (raised at once), or the clip is damaged or lists a frame that its
                decoder does not give (raised when that frame is reached).
        """
        check_seek_mode(seek)
        self._check(indices)
        source = self._source
        if seek == "keyframe":
            indices = self.nearest_keyframes(indices)
            assert isinstance(source, Clip)
            return (source.keyframe(int(index)) for index in indices)
        return (source.frame(int(index)) for index in indices)

    def _check(self, indices: Sequence[int]) -> None:
        count = self.info.frame_count
        for index in indices:
            if not 0 <= index < count:
                raise VideoError(f"'{self.info.path}' has no frame {index}.", f"Its frames are 0 to {count - 1}.")

    def close(self) -> None:
        """Close the file; no frame can be read after that."""
        self._source.close()
        if self._spooled is not None:
            self._spooled.unlink(missing_ok=True)

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_decoder(decoder: str, no_clip: str = "") -> None:
    """Raise InputError for a decoder that there is not, or that does not decode what is `no_clip`."""
    if decoder not in DECODERS:
        raise InputError(f"There is no decoder {decoder!r}.", f"Known ones: {', '.join(DECODERS)}.")
    if no_clip and decoder != "pyav":
        raise InputError(
            f"{no_clip}: --decoder {decoder} is for clips, and not for pictures and frames in memory.",
            f"Leave out --decoder (in Python, decoder={decoder!r}).",
        )


def _open_file(path: Path, shown: Path, fps: float | None, decoder: str) -> FrameSource:
    if fps is not None:
        raise InputError(f"'{shown}' has a rate of its own; fps is for frames without one.", "Leave fps out.")
    check_file(path)
    picture = open_picture(path, shown)
    if not (picture is None or isinstance(picture, str)):
        check_decoder(decoder, f"'{shown}'")
        return picture
    if decoder == "gstreamer":
        from sfexport.video.gstreamer import GStreamerClip

        return GStreamerClip(path, picture, shown)
    return Clip(path, picture, shown)
