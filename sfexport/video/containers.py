"""Open a file with PyAV, choose its video stream and read its packets.

Only listed formats are opened. The others name other files (playlists, patterns) or are no recordings (drawn text,
subtitles), and are refused before any name in them is followed.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import av.error

from sfexport.errors import VideoError
from sfexport.versions import FIRST_ANY_METADATA, is_older
from sfexport.video.timeline import PacketInfo

KINDS_HINT = "MP4, MOV, MKV, WebM, AVI and MPEG files work, and PNG, JPEG, WebP and BMP pictures."
CONVERT_HINT = "Convert it first, for example: ffmpeg -i INPUT -c:v libx264 -pix_fmt yuv420p OUTPUT.mp4"

# FFmpeg's names of formats that hold their frames themselves.
RECORDINGS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,live_flv,kux,asf,asf_o,ogg,mxf,nut,ivf,dv,"
    "rm,wtv,gxf,nsv,nuv,swf,av1,obu,h264,hevc,vvc,evc,m4v,h261,h263,vc1,vc1test,dirac,cavsvideo,avs2,avs3,apv,dnxhd,"
    "mjpeg,mjpeg_2000,mpjpeg,smjpeg,gif,apng,yuv4mpegpipe,flic,roq,bink,smk,thp,4xm,film_cpk,ivr,pva,dxa,ffm,amv,"
    "cine,rpl,vmd,mv,r3d,ser,ty,wc3movie,xmv,filmstrip,jpegxl_anim,lvf,dhav"
)
PICTURES = (
    "png_pipe,jpeg_pipe,bmp_pipe,webp_pipe,tiff_pipe,ppm_pipe,pgm_pipe,pgmyuv_pipe,pbm_pipe,pam_pipe,pcx_pipe,"
    "sgi_pipe,sunrast_pipe,j2k_pipe,jpegls_pipe,jpegxl_pipe,jpegxs_pipe,qoi_pipe,dpx_pipe,psd_pipe,dds_pipe,"
    "exr_pipe,hdr_pipe,pfm_pipe,phm_pipe,gif_pipe,cri_pipe,gem_pipe,pgx_pipe,photocd_pipe,pictor_pipe,qdraw_pipe,"
    "xbm_pipe,xpm_pipe,xwd_pipe,vbn_pipe,ico"
)
# Opened, so that the message can say that they hold no video.
SOUNDS = "wav,w64,mp3,flac,aac,ac3,eac3,dts,aiff,au,caf,amr,ape,wv,tta"
# Texts that name other files, by their beginnings; read only for the message.
PLAYLISTS = {b"#EXTM3U": "an HLS playlist", b"ffconcat": "a list of files (ffconcat)", b"v=0": "a session description"}
PLAYLIST_ROOTS = {b"<MPD": "a DASH manifest", b"<SmoothStreamingMedia": "a Smooth Streaming manifest"}
MAX_PIXELS = 178_956_970  # of a frame; Pillow's limit, too
# Titles and the like that are not UTF-8 must not keep a clip from being opened.
_METADATA: dict[str, Any] = {"metadata_errors": "replace"} if is_older(av.__version__, FIRST_ANY_METADATA) else {}
NOT_CODED_VOP_SIZE = 10  # bytes; MPEG-4 marks a repeated frame by so small a packet, and decoders give nothing for it
# Codecs whose decoders fill damage with other pixels by default, and report it when asked to.
TELLING_CODECS = (
    *("mjpeg", "mpeg1video", "mpeg2video", "mpeg4", "msmpeg4v1", "msmpeg4v2", "msmpeg4", "msmpeg4v3", "h263", "h263i"),
    *("h264", "h263p", "flv", "flv1", "wmv1", "wmv2", "ffv1", "png", "apng"),
)
# With several threads the first three do not report damage, and a damaged VP8 frame depends on the number of threads.
ONE_THREAD_CODECS = ("mpeg1video", "mpeg2video", "ffv1", "vp8")
MPEG4_CODECS = ("mpeg4", "msmpeg4v3", "msmpeg4", "msmpeg4v2")


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn exceptions of av into a VideoError."""
    try:
        yield
    except av.error.DecoderNotFoundError as error:
        raise _unknown_codec(path) from error
    except (av.error.InvalidDataError, av.error.EOFError) as error:
        raise VideoError(f"'{path}' is not a video or picture, or it is damaged or incomplete.", KINDS_HINT) from error
    except (av.error.FFmpegError, OSError, ValueError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "out of memory"
        raise VideoError(f"'{path}' cannot be read as a video ({reason}).", KINDS_HINT) from error


def open_container(path: Path, shown: Path, shape: str | None = None) -> av.container.InputContainer:
    """Open a regular file and nothing else.

    Args:
        shown: path for messages instead of `path`.
        shape: FFmpeg's name of the format; None: FFmpeg chooses it by content and name.

    Raises:
        VideoError: the file is a playlist, or of another format that does not hold its frames itself.
    """
    playlist = _playlist(path)
    if playlist:
        raise VideoError(
            f"'{shown}' is {playlist}, which names other files and is no video itself.", "Name the video itself."
        )
    # Absolute, so that no part of a name is taken for a protocol.
    options = {"protocol_whitelist": "file", "format_whitelist": f"{RECORDINGS},{PICTURES},{SOUNDS}"}
    try:
        opened: Any = av.open(os.path.abspath(path), format=shape, container_options=options, **_METADATA)
    except av.error.ArgumentError as error:
        # FFmpeg's answer to a format that is not listed.
        raise VideoError(f"'{shown}' is not a video or picture of a kind that sfexport opens.", KINDS_HINT) from error
    container: av.container.InputContainer = opened
    return container


def _playlist(path: Path) -> str | None:
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    for start, name in PLAYLISTS.items():
        if head.startswith(start):
            return name
    is_xml = head.startswith(b"<")
    return next((name for root, name in PLAYLIST_ROOTS.items() if is_xml and root in head), None)


def video_streams(container: av.container.InputContainer, path: Path) -> list[av.VideoStream]:
    """Return the video streams without cover art and thumbnails, the main one first.

    FFmpeg's av_find_best_stream chooses the main one, by disposition, frames seen and bit rate.

    Raises:
        VideoError: the container has no video stream.
    """
    aside = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
    streams = [stream for stream in container.streams.video if not stream.disposition & aside]
    if not streams:
        raise VideoError(f"'{path}' contains no video.", "Audio and subtitles alone cannot be looked at.")
    best = container.streams.best("video")

    def preference(stream: av.VideoStream) -> tuple[bool, bool, int]:
        context = stream.codec_context
        pixels = context.width * context.height if context else 0
        is_default = bool(stream.disposition & av.stream.Disposition.default)
        return best is None or stream.index != best.index, not is_default, -pixels

    return sorted(streams, key=preference)


def prepare(stream: av.VideoStream, path: Path, has_threads: bool) -> av.VideoStream:
    """Set a stream to decode on all cores or with one thread, within a limit of pixels."""
    codec = stream.codec_context
    if codec is None:
        raise _unknown_codec(path)
    if codec.width * codec.height > MAX_PIXELS:
        raise VideoError(
            f"'{path}' has frames of {codec.width}x{codec.height} pixels; at most {MAX_PIXELS:,} are taken.",
            "Scale it down first.",
        )
    if not codec.is_open:
        strict = {"err_detect": "crccheck+explode"} if codec.name in TELLING_CODECS else {}
        codec.options = {**codec.options, **strict, "max_pixels": str(MAX_PIXELS)}
        if has_threads and codec.name not in ONE_THREAD_CODECS:
            codec.thread_type = "AUTO"
        else:
            codec.thread_count = 1
    return stream


def packets(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    """Yield the stream's packets that are not empty, as far as the file can be read.

    A last packet that is flagged corrupt was cut off with the file, and is left out. Elsewhere the flag means a loss
    in transmission, which decoders handle better than a missing packet.
    """
    held = None
    try:
        for packet in container.demux(stream):
            if packet.size:
                if held is not None:
                    yield held
                held = packet
    # PyAV raises IndexError at the end of files in which FFmpeg found another stream while reading.
    except (av.error.InvalidDataError, av.error.EOFError, IndexError):
        pass
    if held is not None and not held.is_corrupt:
        yield held


def packet_info(packet: av.Packet, codec: str) -> PacketInfo:
    # VP8 packs a frame that is only referred to into a packet of its own; the bit says whether it is shown.
    is_hidden = codec in ("vp8", "libvpx") and not memoryview(packet)[0] & 0x10
    is_shown = not (packet.is_discard or is_hidden)
    duration = packet.duration or 0
    return PacketInfo(
        packet.pts,
        packet.dts,
        duration,
        packet.is_keyframe,
        is_shown,
        packet.pos,
        content(packet),
        packet.size,
        packet.is_corrupt,
    )


def content(packet: av.Packet) -> int:
    """Return a hash of the packet's size and beginning."""
    return hash((packet.size, zlib.crc32(memoryview(packet)[:1024])))


def times_are_usable(container: av.container.InputContainer, stream: av.VideoStream, infos: list[PacketInfo]) -> bool:
    """Return whether the packets' times are stored in the file, and each packet makes one frame."""
    delays = {p.pts - p.dts for p in infos if p.pts is not None and p.dts is not None}
    # AVI stores decoding order only; FFmpeg's times are a guess, wrong where frames are reordered.
    is_guess = container.format.name == "avi" and stream.codec_context.has_b_frames and len(delays) == 1
    is_mpeg4 = stream.codec_context.name in MPEG4_CODECS
    return not is_guess and not (is_mpeg4 and any(p.size <= NOT_CODED_VOP_SIZE for p in infos))


def _unknown_codec(path: Path) -> VideoError:
    return VideoError(f"The video codec of '{path}' is unknown to PyAV, or the file is incomplete.", CONVERT_HINT)
