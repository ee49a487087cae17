"""Masked inputs where some image has no masked pixel: in small pictures what is measured depends on no batch."""

import numpy as np
import pytest
import torch
from conftest import write_tokens

from pixseq.artifacts.checkpoint import open_checkpoint
from pixseq.config import FinetuneFile, PretrainFile, effective
from pixseq.engine.opening import read_images
from pixseq.errors import PixseqError
from pixseq.models.family import build, shape_from
from pixseq.models.objectives import generative_nats, random_mask
from pixseq.runtime import Machine, generator
from pixseq.stages import evaluate, finetune, pretrain
from pixseq.streams import Stream

WHERE = Machine(torch.device("cpu"), "fp32")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(store of 3x3 pictures, a bert model of them): a quarter of its images have no masked pixel."""
    folder = tmp_path_factory.mktemp("small")
    tokens = write_tokens(folder / "t.zarr", count=40, side=3)
    sets = ["model.objective=bert", "model.n_layer=1", "model.n_head=2", "model.d_model=16"]
    sets += ["train.steps=6", "train.batch_size=8", "train.lr=0.02", "train.val_every=3"]
    pretrain.run(tokens, folder / "m", effective(PretrainFile, sets=sets), device="cpu", precision="fp32")
    return tokens, folder / "m"


def loaded(path):
    checkpoint = open_checkpoint(path)
    net = build(shape_from(checkpoint.shape))
    net.load_state_dict(checkpoint.weights())
    return net.eval()


def test_evaluation_of_small_pictures_is_the_mean_over_images_with_a_masked_pixel(small):
    tokens, path = small
    by_batch = [
        evaluate.run(path, tokens, masks=2, batch_size=size, device="cpu", precision="fp32")["nats_per_token"]
        for size in (1, 7, 40)
    ]
    net, images, total, scored = loaded(path), read_images(tokens, "tokens", None, None, 0)[1], 0.0, 0
    for i in range(40):
        x = images.batch(range(i, i + 1))[0].long()
        for mask in range(2):
            masked = random_mask(1, 9, generator(0, i, mask, Stream.EVALUATION_MASK))
            if masked.any():
                with torch.no_grad():
                    total, scored = total + float(generative_nats(net(x, masked).logits, x, masked)), scored + 1
    assert 40 < scored < 80
    np.testing.assert_allclose(by_batch, total / scored, rtol=1e-5)


def test_nothing_masked_is_no_loss_of_zero(small, tmp_path):
    one = write_tokens(tmp_path / "t.zarr", count=1, side=3)
    seeds = [s for s in range(40) if not random_mask(1, 9, generator(s, 0, 0, Stream.EVALUATION_MASK)).any()]
    with pytest.raises(PixseqError, match="hide no pixel"):
        evaluate.run(small[1], one, masks=1, seed=seeds[0], device="cpu", precision="fp32")


def test_fine_tuning_stops_by_the_vote_over_as_many_masks_as_evaluation_has(small, tmp_path):
    tokens, path = small
    sets = ["finetune.steps=6", "finetune.batch_size=8", "finetune.lr=0.02", "finetune.val_every=3"]
    config = effective(FinetuneFile, sets=sets)
    finetune.run(path, tokens, tmp_path / "f", config, device="cpu", precision="fp32")
    net, held = loaded(tmp_path / "f"), read_images(tokens, "tokens", None, None, 0)[1]
    rows = [
        finetune.accuracy_and_loss(WHERE, net, held, batch, finetune.JointLoss(1.0), seed=3) for batch in (1, 13, 400)
    ]
    masks = net.draw_masks(40 * 5, generator(3, Stream.VALIDATION_MASK))
    x, labels = held.batch(np.arange(40).repeat(5))
    with torch.no_grad():
        predictions = net(x.long(), masks).class_logits.argmax(1).numpy()
    right, tied = 0, 0
    for of_one, label in zip(predictions.reshape(40, 5), labels[::5].numpy()):
        most = np.bincount(of_one, minlength=4)
        right += bool((most[label] == most.max()) and (most == most.max()).sum() == 1)
        tied += bool((most == most.max()).sum() > 1)
    for row in rows:
        assert right <= row["val_accuracy"] * 40 <= right + tied
        assert row["val_accuracy"] == rows[0]["val_accuracy"]
        assert abs(row["val_loss"] - rows[0]["val_loss"]) < 1e-5
    assert len(np.unique(predictions)) > 1
