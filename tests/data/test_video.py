"""Video files: rotation and frame rate."""

from __future__ import annotations

import struct
from fractions import Fraction

import numpy as np
import pytest

from factorkit.data import open_views
from factorkit.data.video import open_video
from factorkit.utils.errors import DataError

av = pytest.importorskip("av")

IDENTITY = (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
QUARTERS = {  # the display matrices of ISO/IEC 14496-12: (p, q) is shown at (a p + c q + x, b p + d q + y)
    "clockwise": (0, 1 << 16, 0, -1 << 16, 0, 0, 32 << 16, 0, 1 << 30),
    "counterclockwise": (0, -1 << 16, 0, 1 << 16, 0, 0, 0, 64 << 16, 1 << 30),
    "upside down": (-1 << 16, 0, 0, 0, -1 << 16, 0, 64 << 16, 32 << 16, 1 << 30),
}


def write(path, ticks):
    """A video of 64 x 32 pixels, its upper half red, whose frames are shown from these 600ths of a second on."""
    image = np.zeros((32, 64, 3), np.uint8)
    image[:16, :, 0] = image[16:, :, 2] = 255
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 600)
        for tick in ticks:
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, 600)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("turn", "red"), [("clockwise", np.s_[:, 20:]), ("counterclockwise", np.s_[:, :12]), ("upside down", np.s_[20:])]
)
def test_open_video_applies_rotation(tmp_path, turn, red):
    path = write(tmp_path / "walk.mp4", range(0, 200, 20))
    content = path.read_bytes()
    at = content.index(struct.pack(">9i", *IDENTITY), content.index(b"tkhd"))
    path.write_bytes(content[:at] + struct.pack(">9i", *QUARTERS[turn]) + content[at + 36 :])
    frames = list(open_video(path).frames)
    assert len(frames) == 10
    assert frames[3].shape == ((32, 64, 3) if turn == "upside down" else (64, 32, 3))
    share = frames[3][red].reshape(-1, 3).mean(0)
    assert share[0] > 200 and share[2] < 50
    np.testing.assert_allclose(open_views(path).images[0].permute(1, 2, 0).numpy() * 255, frames[1], atol=1)


def test_open_video_uneven_times_give_average_rate(tmp_path):
    ticks = [*range(0, 200, 20), *range(200, 6200, 200)]  # 10 at 30 a second, then 30 at 3 a second
    clip = open_video(write(tmp_path / "walk.mp4", ticks))
    assert len(list(clip.frames)) / clip.rate == pytest.approx(10, rel=0.1)


def test_open_video_audio_only_raises(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    with pytest.raises(DataError, match="a.mp4: this video cannot be decoded: no images in it"):
        open_video(tmp_path / "a.mp4")
