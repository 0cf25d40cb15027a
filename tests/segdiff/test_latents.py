"""Denoising in the latents of an autoencoder: every task at the photo's size, files that stand alone, and errors."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import factorkit
from factorkit.cli.main import main
from factorkit.data import draw_flowers
from factorkit.diffusion.schedule import Schedule
from factorkit.nn.autoencoder import Autoencoder, AutoencoderSizes
from factorkit.segdiff import task as task_module
from factorkit.segdiff.alarms import measure_alarms
from factorkit.segdiff.config import preset_config
from factorkit.segdiff.inference.segment import lift_masks, predict_masks
from factorkit.segdiff.latents import LatentSpace, open_autoencoder
from factorkit.segdiff.masks.distil import DistilTask
from factorkit.segdiff.masks.objects import MaskNetwork, resize
from factorkit.segdiff.object_stages import ObjectStages
from factorkit.segdiff.settle import settle_latents
from factorkit.segdiff.task import SegdiffTask
from factorkit.utils.errors import CheckpointError, ConfigError
from factorkit.utils.images import pixels_to_signed
from factorkit.utils.rng import BatchDraw
from tests.engine.trained import assert_identical, final_state

SIZES = AutoencoderSizes(
    **{"channels": (8, 8, 8), "encoder_channels": (8, 8, 8), "attention": True},
    **{"num_res_blocks": 1, "latent_channels": 4, "norm_groups": 4},
)
RUN = {
    **{"preset": "demo", "resolution": 32, "regions": 2, "model_channels": 8, "channel_mult": (1, 2)},
    **{"norm_groups": 4, "batch_size": 4, "steps": 2, "device": "cpu", "progress": False},
    **{"mixture_steps": 2, "distil_steps": 2},
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images():
    return draw_flowers(24, 32, seed=0)[0]


def make_autoencoder():
    torch.manual_seed(0)
    return Autoencoder(SIZES)


def write_format(folder, settings=None, **changes):
    """Write a random autoencoder as diffusers does; ``changes`` are tensors, with dots as two underscores."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.clone() for name, tensor in make_autoencoder().state_dict().items()}
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "AutoencoderKL", "norm_num_groups": 4, "block_out_channels": [8, 8, 8], "act_fn": "silu"}
    (folder / "config.json").write_text(json.dumps(config | (settings or {})))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, images):
    """A latent run whose autoencoder is gone."""
    folder = tmp_path_factory.mktemp("latents")
    autoencoder = write_format(folder / "autoencoder")
    run = factorkit.train_segdiff(images, out=folder / "run", latent=str(autoencoder), **RUN)
    shutil.rmtree(autoencoder)
    return run


def test_latent_space_has_unit_latents_on_the_training_set(images):
    space = LatentSpace(make_autoencoder())
    stored = space.encode_all(images, True, CPU, measure=True)
    latents = space.encode(pixels_to_signed(torch.from_numpy(images)))
    assert latents.shape == (24, 4, 8, 8)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=2e-3, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=2e-3, rtol=0)
    assert stored.dtype == torch.float16 and torch.equal(space.encode_all(images, True, CPU), stored)  # as on resuming
    mirrored = space.encode(pixels_to_signed(torch.from_numpy(images)).flip(3))
    torch.testing.assert_close(stored.float(), torch.stack([latents, mirrored], 1), atol=1e-2, rtol=1e-2)
    decoded = space.autoencoder.decode(latents * space.deviation[:, None, None] + space.mean[:, None, None])
    torch.testing.assert_close(space.decode(latents), decoded.clamp(-1, 1))


def test_lift_masks_follows_the_image_and_sums_to_one(images):
    signed = pixels_to_signed(torch.from_numpy(images[:2]))
    masks = torch.rand(2, 3, 8, 8).softmax(1)
    lifted = lift_masks(masks, signed)
    assert lifted.shape == (2, 3, 32, 32)
    torch.testing.assert_close(lifted.sum(1), torch.ones(2, 32, 32))
    assert lift_masks(lifted, signed) is lifted


@pytest.mark.slow
def test_latent_run_has_object_masks_that_follow_the_pixels_of_the_photo(trained, images):
    assert trained.config.masks == "auto"
    masks = trained.model.masks
    photos = pixels_to_signed(torch.from_numpy(images[:2]))
    latents, t = trained.model.space.encode(photos), torch.zeros(2, dtype=torch.int64)
    with torch.no_grad():
        network = masks.network(latents, t).softmax(1)
        assert network.shape == (2, 2, 8, 8)
        expected = masks.align_with_colors(photos, resize(network, 32, 32))
        torch.testing.assert_close(masks.segment(latents, t=t, images=photos), expected)
        noisy = masks.segment(latents, t=t + 1, images=photos)
    torch.testing.assert_close(noisy, masks.network(latents, t + 1).softmax(1))
    assert masks.typical.limits.isfinite().all()
    assert len(trained.segment(images[:2]).unlike) == 2


@pytest.mark.slow
def test_predict_masks_of_smaller_photos_with_latents_follow_the_smaller_photos(trained, images):
    photos, masks = pixels_to_signed(torch.from_numpy(images[:2])), trained.model.masks
    latents, small = trained.model.space.encode(photos), resize(photos, 16, 16)
    predicted = predict_masks(trained.model, small, 0, trained.schedule, latents=latents)
    with torch.no_grad():
        network = masks.network(latents, torch.zeros(2, dtype=torch.int64)).softmax(1)
        expected = masks.align_with_colors(small, resize(network, 16, 16))
    torch.testing.assert_close(predicted, expected, atol=1e-4, rtol=0)  # EM magnifies rounding, which the batch changes
    whole = predict_masks(trained.model, photos, 0, trained.schedule)
    given = predict_masks(trained.model, photos, 0, trained.schedule, latents=latents)
    torch.testing.assert_close(given, whole, atol=1e-4, rtol=0)


def make_task(trained, images):
    """Return the task of a latent run with ``images`` as its probes, which counts the photos that it encodes."""
    space, config = trained.model.space, trained.config
    task = SegdiffTask(config, np.zeros((2, 2, 4, 8, 8), np.float16), images, CPU, None, space)
    task.model.load_state_dict(trained.model.state_dict())
    return task


@pytest.mark.slow
def test_alarms_of_a_latent_run_encode_the_probes_once_and_equal_those_encoded_anew(trained, images, monkeypatch):
    task, encoded, encode = make_task(trained, images), [], LatentSpace.encode
    monkeypatch.setattr(LatentSpace, "encode", lambda self, x: encoded.append(len(x)) or encode(self, x))
    first, again = task.alarms(task.model), task.alarms(task.model)
    assert sum(encoded) == 2 * len(images) and first == again
    photos = pixels_to_signed(torch.from_numpy(images))
    for stored, view in zip(task.encoded_probes, (photos, photos.flip(3)), strict=True):
        torch.testing.assert_close(stored, trained.model.space.encode(view), atol=1e-4, rtol=1e-4)
    masks, mirrored = (predict_masks(task.model, x, 0, task.schedule) for x in (photos, photos.flip(3)))
    for name, value in dataclasses.asdict(measure_alarms(photos, masks, mirrored, True)).items():
        np.testing.assert_allclose(np.array(value, float), np.array(getattr(first, name), float), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("side", [16, 128])
def test_previews_of_a_latent_run_are_drawn_at_the_preview_side(trained, images, tmp_path, monkeypatch, side):
    monkeypatch.setattr(task_module, "PREVIEW_SIDE", side)
    shapes = []
    for name in ("draw_generation_grid", "draw_segmentation_grid"):
        draw = getattr(task_module.previews, name)

        def record(shown, masks, branches=None, draw=draw, **rest):
            parts = [shown.shape[1:3], masks.shape[2:], *([] if branches is None else [branches.shape[2:4]])]
            shapes.extend(parts)
            return draw(shown, masks, branches, **rest) if branches is not None else draw(shown, masks, **rest)

        monkeypatch.setattr(task_module.previews, name, record)
    task = make_task(trained, images)
    with torch.no_grad():
        task.inspect(task.model, 2, tmp_path)
    assert len(shapes) == 5 and set(shapes) == {(min(side, 32),) * 2}


def test_object_stages_of_latents_measure_small_copies_of_the_photos(tmp_path):
    settings = {"resolution": 256, "regions": 2, "masks": "auto", "latent_channels": 4, "latent_factor": 8}
    photos = np.random.default_rng(0).integers(0, 256, (40, 256, 256, 3), np.uint8)
    stages = ObjectStages(preset_config("demo", **settings).resolved(), photos, tmp_path, {}, CPU, False)
    expected = photos.reshape(40, 32, 8, 32, 8, 3).mean((2, 4))
    assert stages.images.shape == (40, 32, 32, 3) and np.abs(stages.images - expected).max() <= 0.51


def test_distil_task_reads_the_latents_of_the_images_not_of_their_mirror_images():
    def loss(latents):
        torch.manual_seed(0)
        network = MaskNetwork(2, 16, 4)
        torch.nn.init.normal_(network.conv_out.weight)
        masks = torch.randint(0, 256, (4, 2, 32, 32), dtype=torch.uint8)
        config = preset_config("demo", resolution=16).resolved()
        task = DistilTask(config, network, latents, lambda: masks, False, Schedule())
        return task.loss(network, torch.arange(4), BatchDraw(0, 0, 4, slice(0, 4), CPU), torch.tensor(0)).objective

    latents = np.random.default_rng(0).normal(size=(4, 2, 4, 16, 16)).astype(np.float16)
    mirrored, own = latents.copy(), latents.copy()
    mirrored[:, 1], own[:, 0] = 0, 0
    assert loss(latents).equal(loss(mirrored)) and not loss(latents).equal(loss(own))


@pytest.mark.slow
def test_latent_run_segments_generates_and_edits_at_the_size_of_the_photo(trained, images, tmp_path):
    photo = Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 70, 3), np.uint8))
    segmented = trained.segment(photo)
    assert segmented.labels.shape == (1, 50, 70)
    torch.testing.assert_close(segmented.masks.sum(1), torch.ones(1, 50, 70))
    drawn = trained.generate(2, steps=3, trajectory=True)
    assert drawn.images.shape == drawn.trajectory[0].images.shape == (2, 3, 32, 32)
    assert drawn.masks.shape == drawn.trajectory[0].masks.shape == (2, 2, 32, 32)
    edited = trained.recompose(images[:1], 0, from_=images[1:2], steps=2)
    assert ((edited.images - edited.originals).abs().amax(1) <= 1 - edited.kept + 1e-6).all()
    between = trained.interpolate(images[:1], images[1:2], frames=3, steps=2)
    assert between.images.shape == (1, 3, 3, 32, 32) and between.masks.shape == (1, 3, 2, 32, 32)
    assert trained.branches(images[:2]).branches.shape == (2, 2, 3, 32, 32)


@pytest.mark.slow
def test_latent_run_exported_and_its_checkpoints_hold_the_autoencoder(trained, images, tmp_path):
    labels = trained.segment(images[:2]).labels
    exported = factorkit.load(trained.save(tmp_path / "model.safetensors"), device="cpu")
    assert exported.segment(images[:2]).labels.equal(labels)
    moved = shutil.copytree(trained.folder, tmp_path / "moved")
    checkpoint = factorkit.load(moved / "checkpoints/step_00000002.safetensors", device="cpu")
    assert checkpoint.segment(images[:2]).labels.equal(labels)
    (moved / "autoencoder.safetensors").unlink()
    with pytest.raises(CheckpointError, match="there is no checkpoint at .*autoencoder.safetensors"):
        factorkit.load(moved, device="cpu")


@pytest.mark.slow
def test_latent_run_resumed_without_its_autoencoder_is_bit_identical(tmp_path, images):
    autoencoder = write_format(tmp_path / "autoencoder")
    for out, steps in (("whole", 3), ("parts", 1)):
        factorkit.train_segdiff(images, out=tmp_path / out, latent=str(autoencoder), **{**RUN, "steps": steps})
    other = write_format(tmp_path / "other", encoder__conv_in__bias=torch.ones(8))
    with pytest.raises(CheckpointError, match=r"autoencoder: '\w+' there, '\w+' requested"):
        factorkit.train_segdiff(images, out=tmp_path / "parts", latent=str(other), **{**RUN, "steps": 3})
    with pytest.raises(CheckpointError, match=r"autoencoder: '\w+' there, None requested"):
        factorkit.train_segdiff(images, out=tmp_path / "parts", latent="no", masks="network", **{**RUN, "steps": 3})
    shutil.rmtree(autoencoder)
    factorkit.train_segdiff(images, out=tmp_path / "parts", latent=str(autoencoder), **{**RUN, "steps": 3})
    assert_identical(final_state(tmp_path / "parts"), final_state(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"regions": (2, 2)}, {"regions": 1}, {"masks": "network"}, {"backbone": "uvit", "patch_size": 2}]
)
def test_latent_run_of_every_kind_trains_and_generates(tmp_path, images, changes):
    autoencoder = write_format(tmp_path / "autoencoder")
    settings = {**RUN, **changes}
    if "backbone" in changes:
        settings = {k: v for k, v in settings.items() if k != "channel_mult"} | {"depth": 3, "model_channels": 16}
    run = factorkit.train_segdiff(images, out=tmp_path / "run", latent=str(autoencoder), seed_trials=1, **settings)
    assert run.generate(2, steps=2).images.shape == (2, 3, 32, 32)


@pytest.mark.slow
def test_open_autoencoder_other_files_raise(tmp_path, trained):
    with pytest.raises(CheckpointError, match="gone'?: no such file or folder. Give the run folder"):
        open_autoencoder(tmp_path / "gone")
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="no AutoencoderKL of images: it has no tensor .* its first are weight"):
        open_autoencoder(tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("text")
    with pytest.raises(CheckpointError, match="damaged or not a safetensors file"):
        open_autoencoder(tmp_path / "text.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"does not hold one .safetensors file \(there: none\)"):
        open_autoencoder(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="holds a 'segdiff' model, not autoencoder"):
        open_autoencoder(trained.folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 34}, r"resolution=34 must be divisible by 4, the factor of latent="),
        ({"resolution": 16}, r"resolution=16 must be .* and at least 32"),
        (
            {"channel_mult": (1, 1, 1, 1, 1)},
            "^resolution=32, in latents of 8 pixels, cannot be halved 4 times, as 5 levels require; use resolution=64",
        ),
        ({"masks": "mixture"}, r"masks='mixture' measures colours of pixels, not latents"),
        ({"latent_channels": 4}, r"are set by train_segdiff\(latent=...\)"),
    ],
)
def test_train_latent_impossible_settings_raise(tmp_path, images, changes, message):
    autoencoder = write_format(tmp_path / "autoencoder")
    with pytest.raises(ConfigError, match=message):
        factorkit.train_segdiff(images, out=tmp_path / "run", latent=str(autoencoder), **{**RUN, **changes})
    assert not (tmp_path / "run").exists()


def test_resolved_patches_that_do_not_divide_the_latents_name_the_photos_too():
    config = preset_config("uvit32", resolution=32, latent_channels=4, latent_factor=4, patch_size=3)
    expected = (
        "^patch_size=3 must divide resolution=32, in latents of 8 pixels, into at least 2 patches a side; use one"
    )
    with pytest.raises(ConfigError, match=expected):
        config.resolved()


@pytest.mark.slow
def test_train_latent_few_latents_names_a_resolution(tmp_path, images, capsys):
    settings = {**RUN, "progress": True, "steps": 1, "masks": "network"}
    factorkit.train_segdiff(images, out=tmp_path / "run", latent=str(write_format(tmp_path / "ae")), **settings)
    expected = "photos of 32 pixels are 8 x 8 latents, which show little; without resolution= photos of 128 pixels are"
    assert expected in capsys.readouterr().err


def test_settle_latents_without_a_resolution_gives_the_latents_that_of_the_preset(tmp_path):
    changes = {"latent": str(write_format(tmp_path / "autoencoder"))}
    for preset, side in (("fast32", 32), ("fast64", 64)):
        config = settle_latents(preset, changes, tmp_path, {}).config.resolved()
        assert (config.resolution, config.side) == (4 * side, side)
    assert settle_latents("fast64", {**changes, "resolution": 128}, tmp_path, {}).config.resolved().side == 32


@pytest.mark.slow
def test_commands_use_a_latent_run(trained, images, tmp_path, capsys):
    np.save(tmp_path / "images.npy", images[:2])
    photos, run = str(tmp_path / "images.npy"), str(trained.folder)
    for command in (
        ["segment", run, photos, "--out", str(tmp_path / "segmented")],
        ["generate", run, "-n", "2", "--steps", "2", "--out", str(tmp_path / "drawn")],
        ["checkpoint", "export", run, "--out", str(tmp_path / "model.safetensors")],
        ["train", "segdiff", "--latent", str(write_format(tmp_path / "ae")), "--resolution", "32", "--dry-run"],
    ):
        assert main(command) == 0, capsys.readouterr().err


@pytest.mark.parametrize(("words", "side"), [([], 32), (["--resolution", "32"], 8), (["--resolution", "128"], 32)])
def test_command_without_a_resolution_gives_the_latents_that_of_the_preset(tmp_path, monkeypatch, words, side):
    sides = []

    def settle(preset, changes, *arguments):
        sides.append(settle_latents(preset, changes, *arguments).config.side)
        raise KeyboardInterrupt

    monkeypatch.setattr("factorkit.segdiff.train.settle_latents", settle)
    autoencoder = str(write_format(tmp_path / "ae"))
    out = str(tmp_path / "run")
    assert main(["train", "segdiff", "--preset", "fast32", "--latent", autoencoder, "--out", out, *words]) == 130
    assert sides == [side]


def test_space_of_its_tensors_keeps_the_shortcuts_of_the_autoencoder():
    space = LatentSpace(Autoencoder(dataclasses.replace(SIZES, shortcuts=True)))
    images = torch.rand(1, 3, 16, 16)
    loaded = LatentSpace.from_tensors(Path("run"), space.tensors())
    assert loaded.encode(images).equal(space.encode(images)) and loaded.encode(images).abs().max() > 0
    assert loaded.decode(space.encode(images)).equal(space.decode(space.encode(images)))
