"""Decode clips with GStreamer, which uses a board's hardware decoder where a plugin for one is installed.

PyAV lists the frames and their times; GStreamer decodes them. gi, GStreamer's Python bindings, is imported here only,
and when it is first needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np

from sfexport.errors import InputError, MissingDependency, VideoError
from sfexport.versions import GSTREAMER, version_text
from sfexport.video.clip import Clip

INSTALL = (
    "apt-get install python3-gi gir1.2-gstreamer-1.0 gir1.2-gst-plugins-base-1.0 gstreamer1.0-plugins-base "
    "gstreamer1.0-plugins-good gstreamer1.0-plugins-bad gstreamer1.0-libav, and make the virtual environment with the "
    "system's Python and --system-site-packages"
)
PYAV_HINT = "Read it with --decoder pyav."
WAIT_SECONDS = 20  # for the decoder's next frame
MAX_DIFFERENCE = 4.0  # mean of the first frame's values between PyAV and GStreamer, of 255; more: another frame
TOLERANCE_NS = 2_000_000  # between the times that FFmpeg and GStreamer give a frame; containers round to 1 ms
# GStreamer's formats that a frame is taken in, and FFmpeg's names of them.
FORMATS = {"I420": "yuv420p", "NV12": "nv12", "Y42B": "yuv422p", "Y444": "yuv444p", "RGB": "rgb24"}
SKIP = 2  # GST_AUTOPLUG_SELECT_SKIP


def load_gstreamer() -> Any:
    """Import and start GStreamer. Raises MissingDependency if that does not work."""
    # GStreamer loads libunwind for the whole process. C++ libraries (ONNX Runtime) that then take `_Unwind_Resume` from
    # it abort at their first exception: libgcc's must be found first.
    with contextlib.suppress(OSError):
        ctypes.CDLL("libgcc_s.so.1", mode=ctypes.RTLD_GLOBAL)
    try:
        import gi

        gi.require_version("Gst", version_text(GSTREAMER))
        from gi.repository import Gst

        Gst.init(None)
    except Exception as error:  # the module, a typelib or a shared library is absent
        raise MissingDependency("gi", "--decoder gstreamer", INSTALL, failure=error) from None
    return Gst


class GStreamerClip:
    """A source for `Video` whose frames GStreamer decodes, in one pass as long as indices do not decrease.

    Attributes:
        info: as PyAV describes the clip.
        frames_decoded: number of frames that came out of GStreamer's decoder.
    """

    def __init__(self, path: Path, shape: str | None, shown: Path) -> None:
        """Open a clip. Arguments as those of `Clip`.

        Raises:
            MissingDependency: GStreamer's Python bindings are not there.
            InputError: it is a picture.
            VideoError: it is not a clip of one video stream whose frames have times.
        """
        self._gst = load_gstreamer()
        self._path, self._shown = path, shown
        self._clip = Clip(path, shape, shown)
        self._passing: _Pipeline | None = None
        self._at, self._picture = -1, np.empty(0)
        self._decoded_before = 0
        self.info = self._clip.info
        try:
            self._check()
            self._times = [round(time * 1e9) for time in self._clip.times(range(self.info.frame_count))]
        except BaseException:
            self.close()
            raise

    @property
    def frames_decoded(self) -> int:
        return self._decoded_before + (self._passing.decoded if self._passing else 0)

    def times(self, indices: Sequence[int]) -> list[float]:
        return self._clip.times(indices)

    def frame(self, index: int) -> np.ndarray:
        """Return the frame at this position in presentation order, uint8 RGB [height, width, 3].

        Raises:
            VideoError: GStreamer cannot decode the clip, or gives no frame at this one's time.
        """
        if index < self._at or self._passing is None:
            self._stop()
            self._passing = _Pipeline(self._gst, self._path, self._shown, self._times)
            self._check_first(self._picture_of(self._passing.pull(0)))
            self._at = 0
        if index != self._at:
            self._picture = self._picture_of(self._passing.pull(index))
            self._at = index
        return self._picture

    def _picture_of(self, sample: Any) -> np.ndarray:
        return self._clip.picture(_av_frame(self._gst, sample, self._clip.first_frame(), self._shown))

    def _check_first(self, picture: np.ndarray) -> None:
        """Keep the first frame; raise VideoError if it is not PyAV's, as in recordings that begin with missing ones."""
        own = self._clip.frame(0)
        if picture.shape != own.shape or np.abs(picture.astype(np.int16) - own).mean() > MAX_DIFFERENCE:
            raise VideoError(f"GStreamer's first frame of '{self._shown}' differs from PyAV's.", PYAV_HINT)
        self._picture = picture

    def close(self) -> None:
        self._stop()
        self._clip.close()

    def _stop(self) -> None:
        if self._passing is not None:
            self._decoded_before += self._passing.decoded
            self._passing.stop()
            self._passing = None

    def _check(self) -> None:
        if self.info.is_picture:
            raise InputError(f"'{self._shown}' is a picture, and --decoder gstreamer is for clips.", PYAV_HINT)
        if not self._clip.is_timed or self._clip.stream_count != 1:
            reason = "several video streams" if self._clip.is_timed else "frames without usable times"
            raise VideoError(f"'{self._shown}' has {reason}: --decoder gstreamer does not read it.", PYAV_HINT)


class _Pipeline:
    """filesrc ! decodebin ! (nvvidconv !) videoconvert ! appsink, from the beginning of a file.

    A name goes in as a property, never as a part of a description that is parsed.
    """

    def __init__(self, gst: Any, path: Path, shown: Path, times: list[int]) -> None:
        self.decoded = 0
        self._gst, self._shown, self._times = gst, shown, times
        self._first: int | None = None  # stream time of the first frame
        self._wanted = 0
        self._pipeline = gst.Pipeline.new(None)
        source, decoder = self._make("filesrc"), self._make("decodebin")
        try:
            source.set_property("location", os.path.abspath(path))
        except (TypeError, ValueError, UnicodeError) as error:
            raise VideoError(f"GStreamer cannot open a file of the name '{shown}'.", "Rename it.") from error
        # NVIDIA's converter moves frames out of the hardware decoder's memory.
        has_nvidia = gst.ElementFactory.find("nvvidconv") is not None
        converters = [self._make(name) for name in (["nvvidconv"] if has_nvidia else []) + ["videoconvert"]]
        self._sink = self._make("appsink")
        self._sink.set_property("sync", False)
        self._sink.set_property("max-buffers", 1)
        self._sink.set_property("caps", gst.Caps.from_string(f"video/x-raw,format={{{','.join(FORMATS)}}}"))
        source.link(decoder)
        for element, following in zip(converters, [*converters[1:], self._sink], strict=True):
            element.link(following)
        entry = converters[0].get_static_pad("sink")
        entry.add_probe(gst.PadProbeType.BUFFER, self._keep_wanted)
        decoder.connect("autoplug-select", _select)
        decoder.connect("pad-added", lambda _, pad: _link_video(pad, entry))
        self._pipeline.set_state(gst.State.PLAYING)

    def pull(self, index: int) -> Any:
        """Return the sample of a frame at or after the last one's."""
        self._wanted = index
        while True:
            sample = self._next_sample()
            if sample is None:
                raise self._unlike(index)
            found = self._index(sample.get_segment(), sample.get_buffer().pts)
            if found == index:
                if index == len(self._times) - 1 and self._next_sample() is not None:
                    raise VideoError(f"GStreamer gives more frames of '{self._shown}' than PyAV.", PYAV_HINT)
                return sample
            if found is None or found > index:
                raise self._unlike(index)

    def _next_sample(self) -> Any:
        """Wait for a sample as long as the decoder gives frames, of which unwanted ones are dropped.

        Returns None at the end.
        """
        decoded, since = self.decoded, time.monotonic()
        while True:
            sample = self._sink.emit("try-pull-sample", self._gst.SECOND // 10)
            if sample is not None:
                return sample
            message = self._pipeline.get_bus().pop_filtered(self._gst.MessageType.ERROR)
            if message is not None:
                error, _ = message.parse_error()
                raise VideoError(f"GStreamer cannot decode '{self._shown}': {error.message}", PYAV_HINT)
            if self._sink.get_property("eos"):
                return None
            if self.decoded > decoded:
                decoded, since = self.decoded, time.monotonic()
            elif time.monotonic() - since > WAIT_SECONDS:
                raise VideoError(f"GStreamer gave no frame of '{self._shown}' in {WAIT_SECONDS} seconds.", PYAV_HINT)

    def stop(self) -> None:
        self._pipeline.set_state(self._gst.State.NULL)

    def _make(self, name: str) -> Any:
        element = self._gst.ElementFactory.make(name, None)
        if element is None:
            raise MissingDependency(f"GStreamer's {name}", "--decoder gstreamer", INSTALL)
        self._pipeline.add(element)
        return element

    def _keep_wanted(self, pad: Any, about: Any) -> Any:
        """Drop frames before the wanted one, which then are not converted."""
        self.decoded += 1
        segment = pad.get_sticky_event(self._gst.EventType.SEGMENT, 0).parse_segment()
        index = self._index(segment, about.get_buffer().pts)
        is_early = index is not None and index < self._wanted
        return self._gst.PadProbeReturn.DROP if is_early else self._gst.PadProbeReturn.OK

    def _index(self, segment: Any, pts: int) -> int | None:
        """Return the index of the frame of this time; None if there is none."""
        moment = segment.to_stream_time(self._gst.Format.TIME, pts)
        if self._first is None:
            self._first = moment
        moment -= self._first
        at = bisect_left(self._times, moment)
        near = min((i for i in (at - 1, at) if 0 <= i < len(self._times)), key=lambda i: abs(self._times[i] - moment))
        return near if abs(self._times[near] - moment) <= TOLERANCE_NS else None

    def _unlike(self, index: int) -> VideoError:
        seconds = self._times[index] / 1e9
        return VideoError(f"GStreamer gives no frame of '{self._shown}' at {seconds:.3f} seconds.", PYAV_HINT)


def _select(_: Any, pad: Any, caps: Any, factory: Any) -> int:
    """Keep decodebin from elements that open what a file names (playlists)."""
    kind = factory.get_metadata("klass") or ""
    return SKIP if "Adaptive" in kind or "Source" in kind else 0


def _link_video(pad: Any, entry: Any) -> None:
    caps = pad.get_current_caps() or pad.query_caps(None)
    if caps.get_structure(0).get_name().startswith("video/") and not entry.is_linked():
        pad.link(entry)


def _av_frame(gst: Any, sample: Any, like: av.VideoFrame, shown: Path) -> av.VideoFrame:
    """Copy a sample into a frame of PyAV with the colour matrix and range of another frame of the clip."""
    caps, buffer = sample.get_caps().get_structure(0), sample.get_buffer()
    kind, width, height = caps.get_string("format"), caps.get_value("width"), caps.get_value("height")
    name = FORMATS[kind]
    if kind != "RGB" and like.format.name.startswith("yuvj"):
        name = name.replace("yuv", "yuvj")
    frame = av.VideoFrame(width, height, name)
    data = np.frombuffer(buffer.extract_dup(0, buffer.get_size()), np.uint8)
    end = 0
    for plane, (stride, rows) in zip(frame.planes, _plane_sizes(kind, width, height), strict=True):
        start, end = end, end + stride * rows
        if end > len(data):
            raise VideoError(f"GStreamer gives frames of '{shown}' in an unknown layout.", PYAV_HINT)
        stored = data[start:end].reshape(rows, stride)[: plane.height]
        padded = np.zeros((plane.height, plane.line_size), np.uint8)
        columns = min(stride, plane.line_size)
        padded[:, :columns] = stored[:, :columns]
        plane.update(padded.tobytes())
    frame.colorspace, frame.color_range = like.colorspace, like.color_range
    return frame


def _plane_sizes(kind: str, width: int, height: int) -> Iterator[tuple[int, int]]:
    """Yield (bytes per row, rows) of each plane in GStreamer's default layout."""
    full, half, even = _up(width, 4), _up(_up(width, 2) // 2, 4), _up(height, 2)
    return iter(
        {
            "I420": [(full, even), (half, even // 2), (half, even // 2)],
            "NV12": [(full, even), (full, even // 2)],
            "Y42B": [(full, height), (_up(width, 8) // 2, height), (_up(width, 8) // 2, height)],
            "Y444": [(full, height)] * 3,
            "RGB": [(_up(3 * width, 4), height)],
        }[kind]
    )


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
