"""The supervised U-Net, and clusters of a plain DDPM's features."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from factorkit.metrics.segmentation import IGNORE_LABEL
from factorkit.segdiff.baselines.datasetddpm import DatasetDDPM, pixel_features, select_blocks
from factorkit.segdiff.baselines.supervised import SupervisedTask, predict_classes, train_supervised
from factorkit.segdiff.config import preset_config
from factorkit.utils.errors import CheckpointError, ConfigError, DataError
from factorkit.utils.rng import BatchDraw

TINY = {
    "masks": "network",
    "resolution": 16,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (),
    "norm_groups": 4,
    "batch_size": 8,
    "warmup_steps": 0,
    "lr_decay_fraction": 0.0,
    "ema_decay": 0.9,
    "sample_every": 0,
    "log_every": 20,
    "checkpoint_every": 100,
}


@pytest.fixture
def make_halves():
    """make_halves(count): noise that is bright in one half, and labels of the halves."""

    def make(count, seed=0):
        rng = np.random.default_rng(seed)
        truth = np.zeros((count, 16, 16), np.int64)
        for i, edge in enumerate(rng.integers(4, 12, count)):
            truth[i, :, edge:] = 1
        images = rng.integers(0, 120, (count, 16, 16, 3)) + 120 * truth[..., None]
        return images.astype(np.uint8), truth

    return make


@pytest.mark.slow
def test_train_supervised_learns_its_labels_and_reuses_a_finished_run(make_halves, tmp_path):
    images, truth = make_halves(16)
    labels = np.where(np.random.default_rng(2).random(truth.shape) < 0.25, IGNORE_LABEL, truth)
    config = preset_config("demo", **TINY, steps=60, learning_rate=3e-3).resolved()
    model = train_supervised(images, labels, 2, config, tmp_path / "run", progress=False)
    unseen, wanted = make_halves(8, seed=1)
    result = predict_classes(model, unseen)
    assert result.shape == wanted.shape and (result == wanted).mean() > 0.95
    before = (tmp_path / "run" / "log.jsonl").read_text()
    again = train_supervised(images, labels, 2, config, tmp_path / "run", progress=False)
    assert np.array_equal(predict_classes(again, unseen), result)
    assert (tmp_path / "run" / "log.jsonl").read_text() == before
    for other in ((images[:, ::-1], labels), (images, 1 - labels.clip(0))):
        with pytest.raises(CheckpointError, match=r"other data .*sha256"):
            train_supervised(*other, 2, config, tmp_path / "run", progress=False)
    with pytest.raises(DataError, match="use 0 to 0"):
        train_supervised(images, labels, 1, config, tmp_path / "other", progress=False)


def test_supervised_loss_averages_over_counted_pixels(make_halves):
    """The loss equals the pixel-weighted mean of the losses of rows 0 to 3 and of the rest."""
    images, truth = make_halves(4)
    config = preset_config("demo", **TINY).resolved()

    def compute_loss(rows):
        labels = np.full_like(truth, IGNORE_LABEL)
        labels[:, rows] = truth[:, rows]
        task = SupervisedTask(config, images, labels, 2, torch.device("cpu"))
        task.model.decoder.conv_out.reset_parameters()
        torch.nn.init.constant_(task.model.decoder.conv_out.weight, 0.1)
        task.model.decoder.conv_out.bias.data = torch.tensor([0.3, -0.2])
        draw = BatchDraw(0, 0, 4, slice(0, 4), torch.device("cpu"))
        draw.restart(0)
        return task.loss(task.model, torch.arange(4), draw, torch.zeros(())).objective

    whole = compute_loss(slice(None))
    assert whole.std() > 0
    torch.testing.assert_close(0.25 * compute_loss(slice(0, 4)) + 0.75 * compute_loss(slice(4, None)), whole)
    assert compute_loss(slice(0, 0)).tolist() == [0.0] * 4


def test_pixel_features_come_from_the_published_blocks(make_random_run, make_images):
    run = make_random_run(regions=1, channel_mult=(1, 2), num_res_blocks=2)
    blocks = [block for level in run.model.decoder.levels for block in level.blocks]
    assert len(blocks) == 6 and select_blocks(run) == [blocks[1], blocks[2], blocks[4]]
    features = pixel_features(run, make_images(3))
    channels = sum(block.conv2.out_channels for block in select_blocks(run))
    assert features.shape == (3, 3 * channels, 16, 16)
    alone = pixel_features(run, make_images(3)[1:2])[0]
    torch.testing.assert_close(alone, features[1], rtol=1e-4, atol=1e-4, msg="features depend on their own image only")
    assert not blocks[1]._forward_hooks
    with pytest.raises(ConfigError, match="regions=3"):
        select_blocks(make_random_run())


@pytest.mark.slow
def test_datasetddpm_separates_different_textures(make_random_run, make_halves):
    run = make_random_run(regions=1)
    images, truth = make_halves(6)
    model = DatasetDDPM(run, images, num_regions=2, seed=0)
    result = model.segment(images)
    assert result.shape == truth.shape and set(np.unique(result)) == {0, 1}
    agreement = (result == truth).mean()
    assert max(agreement, 1 - agreement) > 0.8
    assert np.array_equal(DatasetDDPM(run, images, num_regions=2, seed=0).segment(images[2:4]), result[2:4])
