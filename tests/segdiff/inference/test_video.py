"""Videos: read frame by frame, segmented without flicker, written completely or not at all."""

from __future__ import annotations

import sys
from fractions import Fraction

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from PIL import Image

from factorkit.data.video import open_video
from factorkit.segdiff.inference.video import STILL_COLOUR_CHANGE, Smoother, segment_frames
from factorkit.utils.errors import ConfigError, DataError, WriteError

av = pytest.importorskip("av")


@pytest.fixture
def run(make_random_run):
    run = make_random_run(regions=3)
    with torch.no_grad():
        run.model.masks.decoder.conv_out.weight.mul_(30)
    return run


def make_still_scene(count, seed=0, noise=10.0, size=(36, 46)):
    """A still scene with sensor noise, uint8 [count, H, W, 3]."""
    rng = np.random.default_rng(seed)
    small = rng.integers(40, 216, (5, 6, 3), np.uint8)
    scene = np.asarray(Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC), np.float32)
    return np.clip(scene + noise * rng.standard_normal((count, *scene.shape)), 0, 255).astype(np.uint8)


def segment_labels(run, frames, smooth):
    result = segment_frames(frames, run.config, run.predictor(None, "fast"), size=16, upsample="guided", smooth=smooth)
    return np.stack([labels for _, labels in result])


def test_segment_frames_without_smoothing_equals_segment(run):
    frames = make_still_scene(3)
    result = segment_labels(run, frames, 0.0)
    assert np.array_equal(result, run.segment(frames).labels.numpy())
    assert len(np.unique(result)) > 1


def test_segment_frames_smoothing_removes_flicker_of_a_still_scene(run):
    frames = make_still_scene(24)
    flicker = lambda labels: (labels[13:] != labels[12:-1]).mean()  # noqa: E731
    before, after = (flicker(segment_labels(run, frames, smooth)) for smooth in (0.0, 0.8))
    assert before > 0.002, "the frames must flicker without smoothing"
    assert after < 0.4 * before


def test_smoother_equals_its_formula_and_resets_at_cuts():
    torch.manual_seed(0)
    a, b, c = torch.rand(3, 2, 10, 10).softmax(1)
    make_flat = lambda value: np.full((20, 20, 3), value, np.uint8)  # noqa: E731
    smoother = Smoother(0.75)

    def step(frame, masks):
        smoothed, keep = smoother.frame(frame)
        return smoothed, smoother.masks(masks, keep)

    smoothed, result = step(make_flat(20), a)
    assert torch.equal(result, a) and (smoothed == 20).all()
    smoothed, result = step(make_flat(24), b)
    weight = 0.75 * np.exp(-((4 / 255) ** 2) / (2 * STILL_COLOUR_CHANGE**2))
    assert (smoothed == round(weight * 20 + (1 - weight) * 24)).all()
    torch.testing.assert_close(result, (weight * a + (1 - weight) * b).float())
    smoothed, result = step(make_flat(230), c)
    assert (smoothed == 230).all()
    torch.testing.assert_close(result, c, msg="a changed image must reset the old masks")
    half = make_flat(230)
    half[:, :10] = 20  # An object moves on the left; the right is still.
    smoothed, result = step(half, a)
    assert np.array_equal(smoothed, half)
    torch.testing.assert_close(result[..., :4], a[..., :4])
    torch.testing.assert_close(result[..., 6:], (0.75 * c + 0.25 * a)[..., 6:])
    torch.testing.assert_close(result.sum(0), torch.ones(10, 10))


def test_segment_frames_reads_frames_lazily(run):
    taken = 0

    def frames():
        nonlocal taken
        for frame in make_still_scene(40):
            taken += 1
            yield frame

    result = segment_frames(frames(), run.config, run.predictor(None, "fast"), size=16, upsample="guided", smooth=0.5)
    next(result)
    assert taken <= 16
    assert sum(1 for _ in result) == 39


@pytest.mark.slow
def test_segment_video_writes_a_video(run, tmp_path):
    frames = make_still_scene(5, size=(35, 47))
    imageio.imwrite(tmp_path / "in.mkv", frames, plugin="pyav", codec="ffv1", fps=12)
    summary = run.segment_video(tmp_path / "in.mkv", tmp_path / "new" / "out.mp4", progress=False)
    assert (
        summary.frames == 5 and summary.rate == 12 and abs(sum(summary.areas) - 1) < 1e-6 and 0 <= summary.changes < 1
    )
    frames_read = imageio.imread(summary.out, plugin="pyav")
    assert frames_read.shape == (5, 36, 48, 3), "odd sides must gain a row and a column"
    assert imageio.immeta(summary.out, plugin="pyav")["fps"] == 12
    assert sorted(path.name for path in summary.out.parent.iterdir()) == [".factorkit.jsonl", "out.mp4"]


@pytest.mark.slow
def test_segment_video_folder_uses_name_order(run, tmp_path):
    for number, frame in enumerate(make_still_scene(3)):
        Image.fromarray(frame).save(tmp_path / f"{number}.png")
    clip = open_video(tmp_path)
    assert clip.length == 3 and clip.rate == 24
    assert np.array_equal(np.stack(list(clip.frames)), make_still_scene(3))
    assert run.segment_video(tmp_path, tmp_path / "out" / "x.mp4", progress=False).frames == 3


def test_segment_video_folder_uses_natural_order(tmp_path):
    colours = {f"frame{number}.png": 20 * number for number in (1, 2, 10, 11)}
    for name, colour in colours.items():
        Image.new("RGB", (4, 4), (colour,) * 3).save(tmp_path / name)
    assert [frame[0, 0, 0] for frame in open_video(tmp_path).frames] == [20, 40, 200, 220]
    listed = [tmp_path / "frame10.png", tmp_path / "frame2.png"]
    assert [frame[0, 0, 0] for frame in open_video(listed).frames] == [200, 40], "a list must keep its order"


@pytest.mark.parametrize("name", ["walk.gif", "walk.webp", "walk.png"])
def test_segment_video_animated_image_uses_its_frames(tmp_path, name):
    first, *rest = [Image.new("RGB", (8, 6), (colour,) * 3) for colour in (30, 90, 200, 150)]
    durations = [100, 100, 100, 500]
    first.save(tmp_path / name, save_all=True, append_images=rest, duration=durations, lossless=True)
    for source in (tmp_path / name, Image.open(tmp_path / name)):
        clip = open_video(source)
        assert clip.length == 4 and clip.rate == pytest.approx(5)
        assert [frame[2, 3].tolist() for frame in clip.frames] == [[v] * 3 for v in (30, 90, 200, 150)]


@pytest.mark.slow
def test_segment_video_failure_leaves_no_file(run, tmp_path):
    (tmp_path / "noise.mp4").write_bytes(b"no video at all" * 100)
    out = tmp_path / "out.mp4"
    with pytest.raises(DataError, match=r"noise.mp4: this video cannot be decoded"):
        run.segment_video(tmp_path / "noise.mp4", out, progress=False)
    with pytest.raises(DataError, match="no such video"):
        run.segment_video(tmp_path / "none.mp4", out, progress=False)
    frames = [Image.fromarray(frame) for frame in (*make_still_scene(2), *make_still_scene(1, size=(20, 20)))]
    with pytest.raises(DataError, match="frame 2 has 20 x 20 pixels, the first 46 x 36"):
        run.segment_video(frames, out, progress=False)
    with pytest.raises(ConfigError, match=r"\.mp4"):
        run.segment_video(make_still_scene(2), tmp_path / "out.gif", progress=False)
    with pytest.raises(ConfigError, match="smooth=1"):
        run.segment_video(make_still_scene(2), out, smooth=1.0, progress=False)
    with pytest.raises(WriteError, match="cannot be written"):
        run.segment_video(make_still_scene(2), tmp_path / "noise.mp4" / "out.mp4", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["noise.mp4"]


@pytest.mark.slow
def test_segment_video_truncated_video_raises_or_ends(run, tmp_path):
    imageio.imwrite(tmp_path / "in.mp4", make_still_scene(30), plugin="pyav", codec="libx264", fps=12)
    whole = (tmp_path / "in.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be decoded"):
        run.segment_video(tmp_path / "cut.mp4", tmp_path / "out.mp4", progress=False)


def test_segment_video_without_imageio_error_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "imageio.v3", None)
    (tmp_path / "a.mp4").touch()
    with pytest.raises(ConfigError, match=r"factorkit\[video\]"):
        open_video(tmp_path / "a.mp4")


def write_clip(path, times, *, sound=None, options=None):
    """A video whose frames are shown at these times, in ms, and a tone in another codec beside it."""
    with av.open(str(path), "w", options=options or {}) as file:
        video = file.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 48, 40, "yuv420p"
        video.codec_context.time_base = Fraction(1, 1000)
        tone = None if sound is None else file.add_stream(sound, rate=48000, layout="mono")
        for pixels, time in zip(make_still_scene(len(times), size=(40, 48)), times, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            file.mux(video.encode(frame))
        file.mux(video.encode())
        if tone is not None:
            samples = (np.sin(np.arange(48 * times[-1]) / 17) * 9000).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
            frame.sample_rate, frame.pts = 48000, 0
            file.mux(tone.encode(frame))
            file.mux(tone.encode())
    return path


def times_of(path, kind="video"):
    with av.open(str(path)) as file:
        return [round(1000 * frame.time) for frame in file.decode(**{kind: 0})]


UNEVEN = [0, 40, 80, 500, 540, 580, 1300, 1340]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
@pytest.mark.parametrize("source", ["in.mp4", "in.mkv"])
def test_segment_video_keeps_uneven_times(run, tmp_path, source, suffix):
    write_clip(tmp_path / source, UNEVEN)
    summary = run.segment_video(tmp_path / source, tmp_path / f"out{suffix}", progress=False)
    assert summary.frames == len(UNEVEN) and times_of(summary.out) == times_of(tmp_path / source) == UNEVEN


def test_segment_video_keeps_uneven_times_of_gif(run, tmp_path):
    first, *rest = map(Image.fromarray, make_still_scene(4, size=(16, 16)))
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest, duration=[100, 50, 500, 100])
    summary = run.segment_video(tmp_path / "a.gif", tmp_path / "out.mp4", progress=False)
    assert times_of(summary.out) == [0, 100, 150, 650]


@pytest.mark.parametrize(
    ("sound", "suffix", "codec"),
    [("aac", ".mp4", "aac"), ("pcm_s16le", ".mp4", None), ("flac", ".mkv", "flac"), ("flac", ".mov", "aac")],
)
def test_segment_video_keeps_the_sound(run, tmp_path, sound, suffix, codec):
    write_clip(tmp_path / "in.mkv", UNEVEN, sound=sound)
    summary = run.segment_video(tmp_path / "in.mkv", tmp_path / f"out{suffix}", progress=False)
    with av.open(str(summary.out)) as file:
        assert codec in (None, file.streams.audio[0].codec_context.name)
        samples = np.concatenate([f.to_ndarray().astype(float).mean(0) for f in file.decode(audio=0)])
    assert 1.2 < len(samples) / 48000 < 1.45 and samples.std() > 0
    assert times_of(summary.out) == UNEVEN


def test_segment_video_without_average_rate_keeps_times(run, tmp_path, monkeypatch):
    write_clip(tmp_path / "in.mkv", UNEVEN)
    monkeypatch.setattr(
        "factorkit.segdiff.inference.segmenter.open_video", lambda *a, **k: open_video(*a, **k)._replace(rate=24.0)
    )
    assert times_of(run.segment_video(tmp_path / "in.mkv", tmp_path / "out.mp4", progress=False).out) == UNEVEN


@pytest.mark.parametrize("name", ["in.mp4", "in.mkv"])
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_segment_video_cut_off_is_an_error_or_partial(run, tmp_path, name, share):
    whole = write_clip(tmp_path / f"whole{name}", [40 * i for i in range(40)], options={"movflags": "faststart"})
    (tmp_path / name).write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
    with pytest.raises(DataError, match=rf"{name}: .*(before the end that its header names|cannot be decoded)"):
        run.segment_video(tmp_path / name, tmp_path / "out.mp4", progress=False)
    assert not (tmp_path / "out.mp4").exists()
    with pytest.warns(UserWarning, match="the rest is left out"):
        summary = run.segment_video(tmp_path / name, tmp_path / "out.mp4", progress=False, partial=True)
    times = times_of(summary.out)
    assert 1 < summary.frames == len(times) < 40 and set(times) <= {40 * i for i in range(40)}


@pytest.mark.parametrize("overwrite", [False, True])
def test_segment_video_never_replaces_its_input(run, tmp_path, overwrite):
    write_clip(tmp_path / "in.mp4", UNEVEN)
    before = (tmp_path / "in.mp4").read_bytes()
    (tmp_path / "link.mp4").symlink_to(tmp_path / "in.mp4")
    (tmp_path / "sub").mkdir()
    for source, out in (
        ("in.mp4", "in.mp4"),
        ("in.mp4", "link.mp4"),
        ("link.mp4", "in.mp4"),
        ("in.mp4", "sub/../in.mp4"),
    ):
        with pytest.raises(WriteError, match="one of the inputs"):
            run.segment_video(str(tmp_path / source), tmp_path / out, overwrite=overwrite, progress=False)
    assert (tmp_path / "in.mp4").read_bytes() == before


def test_segment_video_replaces_only_its_own_result(run, tmp_path):
    write_clip(tmp_path / "in.mp4", UNEVEN)
    write_clip(tmp_path / "other.mp4", UNEVEN)
    out = tmp_path / "out.mp4"
    for _ in range(2):
        run.segment_video(tmp_path / "in.mp4", out, progress=False)
    with pytest.raises(WriteError, match=r"written for another input .*in\.mp4"):
        run.segment_video(tmp_path / "other.mp4", out, progress=False)
    run.segment_video(tmp_path / "other.mp4", out, overwrite=True, progress=False)
    out.write_bytes(b"mine")
    with pytest.raises(WriteError, match="changed after factorkit wrote it"):
        run.segment_video(tmp_path / "other.mp4", out, progress=False)
    assert out.read_bytes() == b"mine"
