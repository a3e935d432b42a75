"""Video files, folders of frames and pictures, read and written exactly; the only package that imports av."""

from praxino.video.pictures import frames_in, is_sequence
from praxino.video.reader import Video, probe, read
from praxino.video.types import (
    IMAGE_SUFFIXES,
    MAX_PIXELS,
    VIDEO_SUFFIXES,
    DecodeFailure,
    Geometry,
    Reason,
    VideoInfo,
    to_float,
    to_uint8,
)
from praxino.video.writer import Writer, write

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "VIDEO_SUFFIXES",
    "DecodeFailure",
    "Geometry",
    "Reason",
    "Video",
    "VideoInfo",
    "Writer",
    "frames_in",
    "is_sequence",
    "probe",
    "read",
    "to_float",
    "to_uint8",
    "write",
]
