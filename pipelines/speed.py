"""Ratios of an AIM training step, its prefix mask and its features to bare forms of the same blocks, in one run.

`python speed.py [images] [side] [patch]`: no figure is judged here; each line says what it is compared with.
"""

import resource
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from pixseq.config import PretrainFile, effective
from pixseq.engine.images import Images
from pixseq.engine.state import Run
from pixseq.engine.step import accumulate, share_of_batch
from pixseq.models.aim import AIM, AimShape
from pixseq.models.sight import Sight
from pixseq.runtime import machine
from pixseq.stages.features import Pooling, _activations
from pixseq.stages.pretrain import losses


def seconds(*works: Callable[[], object], repeats: int = 9) -> list[float]:
    """The median time of each, called in turns after one round to warm up: a busy machine then troubles all alike."""
    times: list[list[float]] = [[] for _ in works]
    for turn in range(repeats + 1):
        for work, taken in zip(works, times):
            began = time.perf_counter()
            work()
            if turn:
                taken.append(time.perf_counter() - began)
    return [float(np.median(taken)) for taken in times]


def main(count: int = 64, side: int = 32, patch: int = 4) -> None:
    config = effective(PretrainFile, "aim-cifar32", sets=[f"train.batch_size={count}"])
    rng = np.random.default_rng(0)
    images = Images(rng.integers(0, 256, (4 * count, side, side, 3), dtype=np.uint8), None, (side, side, 3))
    with machine() as where:
        shape = AimShape.of({**vars(config.model), "patch_size": patch}, (side, side, 3), None, "raster")
        net = AIM(shape).init_weights(torch.Generator().manual_seed(0)).to(where.device)
        pixels = torch.from_numpy(images.rows[:count]).to(where.device)
        ready = net.patches(pixels)

        def bare(causal: bool, backward: bool = True) -> None:
            """Blocks, head and a squared error on patches that lie ready: no data, mask or targets to make."""
            h = net.patch_norm(net.patch_embed(ready)) + net.places(shape.d_model)
            for block in net.blocks:
                h = block(h, Sight(causal))
            if backward:
                predicted = net.head(net.ln_f(h), net.places(shape.head_width))
                (predicted - ready).square().mean().backward()
                net.zero_grad()

        def gradients(attention: str) -> None:
            net.attention = attention
            masked = net.draw_masks(count, torch.Generator().manual_seed(0))
            net.losses(net(pixels, masked), pixels, masked).sum().backward()
            net.zero_grad()

        run = Run(net, config.train, None)

        def step() -> None:
            net.attention = "prefix"
            accumulate(where, net, net, losses, share_of_batch(where, images, config.train, run.step, net), count)
            run.step += 1
            net.zero_grad()

        compute = _activations(where, net, list(range(shape.n_layer + 1)), 1, 0, Pooling("mean", None))

        def features() -> None:
            net.attention = "bidirectional"
            with torch.inference_mode():
                compute(images.rows[:count], 0)

        def bare_forward() -> None:
            with torch.inference_mode():
                bare(False, backward=False)

        rows = [
            ("training step (data, crops, prefix, loss) / bare causal step", step, lambda: bare(True)),
            ("prefix / causal forward and backward", lambda: gradients("prefix"), lambda: gradients("causal")),
            ("features of all layers / bare forward", features, bare_forward),
        ]
        for name, ours, other in rows:
            a, b = seconds(ours, other)
            print(f"{a / b:6.3f}  {name}: {1e3 * a:.0f} / {1e3 * b:.0f} ms for {count} images")
        print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:6.0f}  MiB at most")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
