"""AIM: autoregressive regression of patches ("Scalable Pre-training of Large Autoregressive Image Models", §4).

Position p predicts patch p + 1 from the patches up to p, so there is no start token and the first patch is never a
target. Shapes: B images, K patches, P values a patch (patch_size^2 * 3), D width, H heads, W head width, V codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixseq.errors import UsageError
from pixseq.models.attention_mask import AttentionMask, flex, flex_serves, prefix_block_mask, prefix_mask
from pixseq.models.attentive import AttentiveProbe
from pixseq.models.flops import COUNTING, training_flops
from pixseq.models.order import Ordered
from pixseq.models.output import Output
from pixseq.models.patches import normalised, patchify, sincos_2d, unpatchify
from pixseq.streams import Stream

NORM_EPS = 1e-6
CODE_PATCHES = 1 << 17  # that the codes are the k-means of
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet: what the published models were trained with
ATTENTIONS = ("bidirectional", "causal", "prefix")


@dataclass(frozen=True)
class AimShape:
    """What fixes every tensor of the model. height and width are of the picture; `head` False: no prediction head.

    `attention` is that of pretraining, `adapted` that of use; `target` what the head predicts: the patch's values
    normalised by its own mean and deviation, its values, or the nearest of `n_codes` patches. `probe_layers`: blocks
    whose mean an attentive class head of `probe_heads` heads reads; none: a linear head on the mean over patches.
    """

    n_layer: int
    n_head: int
    d_model: int
    patch_size: int
    height: int
    width: int
    head_depth: int = 12
    head_width: int = 2048
    target: str = "norm-pixels"
    n_codes: int = 0
    attention: str = "prefix"
    adapted: str = "bidirectional"
    order: str = "raster"
    n_classes: int = 0
    head: bool = True
    probe_heads: int = 0
    probe_layers: tuple[int, ...] = ()
    reads: ClassVar[str] = "pixels"  # the kind of artifact it is trained on
    hidden_states: ClassVar[str] = "residual stream after so many blocks; 0: after the embedding"  # its features
    family: str = "aim"

    @property
    def pretraining_attention(self) -> str:
        """The attention pattern of pretraining."""
        return self.attention

    @property
    def attention_patterns(self) -> tuple[str, ...]:
        """The attention patterns it can be used with, its default first.

        What was trained causally declines without its mask (table 3d) and keeps it until fine-tuning takes another.
        """
        usual = self.attention if self.attention == "causal" and not self.n_classes else self.adapted
        return (usual, *(name for name in ATTENTIONS if name != usual))

    can_sample: ClassVar[bool] = False  # whether it can be sampled
    masks: ClassVar[int] = 1  # random masks an image is seen under where features are made of it

    def needs_mask(self, attention: str) -> bool:
        """Whether forward needs a mask, of a random prefix, with this attention."""
        return attention == "prefix"

    def predicts(self, attention: str) -> bool:
        """Whether there is a pretraining loss with this attention: where all is seen, there is nothing to predict."""
        return self.head and attention != "bidirectional"

    def adapted_to(self, attention: str) -> AimShape:
        """The same model with another default pattern of use."""
        return replace(self, adapted=attention)

    def for_pretraining(self) -> AimShape:
        """The same model without a class head, and with a prediction head, to train it on."""
        bare = replace(self, n_classes=0, head=True, probe_heads=0, probe_layers=(), adapted=AimShape.adapted)
        return bare.adapted_to(bare.attention_patterns[0])

    def report(self, loss: float, channels: int) -> dict[str, float]:
        """A mean loss in the units it is told in: squared error a value, of normalised patches or by ImageNet's."""
        name = {"norm-pixels": "normalized_mse", "pixels": "pixel_mse", "codes": "nats_per_patch"}[self.target]
        return {name: loss}

    @classmethod
    def of(cls, config: Mapping[str, Any], grid: tuple[int, int, int], n_vocab: int | None, order: str) -> AimShape:
        """The shape of a configuration on pixels. Raises UsageError where patches do not fit."""
        (height, width, _), patch = grid, config["patch_size"]
        if height % patch or width % patch or height * width <= patch * patch:
            raise UsageError(
                f"model.patch_size {patch} does not divide pictures of {height}x{width} into patches",
                "choose a divisor of both sides, or encode at another --size",
            )
        n_codes = config["n_codes"] if config["target"] == "codes" else 0
        config = {key: value for key, value in config.items() if key != "image_size"}  # the grid has it
        shape = cls(**{**config, "n_codes": n_codes}, height=height, width=width, order=order)
        return shape.adapted_to(shape.attention_patterns[0])

    def config(self) -> dict[str, Any]:
        """The configuration that `of` makes this shape from."""
        keys = ["family", "n_layer", "n_head", "d_model", "patch_size", "head_depth", "head_width", "target"]
        keys += ["n_codes"] * (self.target == "codes") + ["attention"]
        return {key: getattr(self, key) for key in keys}

    def positions(self) -> Tensor:
        """The fixed ones in raster order, [K, D]."""
        return sincos_2d(*self.grid, self.d_model)

    def sequence_grid(self, grid: tuple[int, int, int]) -> tuple[int, int, int]:
        """Rows, columns and positions a cell of the picture that the sequence runs over."""
        return *self.grid, 1

    @property
    def objective(self) -> str:
        return self.target

    @property
    def grid(self) -> tuple[int, int]:
        return self.height // self.patch_size, self.width // self.patch_size

    @property
    def n_ctx(self) -> int:
        return math.prod(self.grid)

    @property
    def patch_values(self) -> int:
        return 3 * self.patch_size**2

    @property
    def outputs(self) -> int:
        return self.n_codes if self.target == "codes" else self.patch_values

    def trunk_count(self) -> int:
        """Parameters without the prediction head: what the paper's sizes count."""
        d = self.d_model
        return self.patch_values * d + 3 * d + self.n_layer * (12 * d * d + 4 * d) + 2 * d

    def block_count(self) -> int:
        """The weights of the blocks' matrices."""
        return 12 * self.n_layer * self.d_model**2

    def head_count(self) -> int:
        """Parameters of the prediction head; the same for every trunk of the paper."""
        d, w = self.d_model, self.head_width
        return self.head * (d * w + w + self.head_depth * (8 * w * w + 2 * w) + 2 * w + (w + 1) * self.outputs)

    def parameter_count(self) -> int:
        d = self.d_model
        classifier = self.n_classes * d + (2 * d * d + d if self.n_classes and self.probe_layers else 0)
        return self.trunk_count() + self.head_count() + classifier

    def flops_per_token(self, counting: str = COUNTING) -> int:
        """Training floating point operations a patch, the head's included, see flops.py."""
        d, w = self.d_model, self.head_width
        multiplied = self.patch_values * d + self.block_count()
        multiplied += self.head * (d * w + 8 * self.head_depth * w * w + w * self.outputs)
        parameters = self.trunk_count() + self.head_count()
        return training_flops(
            counting, parameters, multiplied, self.n_layer, d, self.n_ctx, causal=self.attention == "causal"
        )

    def activation_bytes(self, width: int) -> int:
        """What training on one image holds, in numbers of `width` bytes: a rough count."""
        head = self.head * (self.head_width * self.head_depth * 10 + 4 * self.outputs)
        return self.n_ctx * width * (self.d_model * self.n_layer * 18 + head)


class Attention(nn.Module):
    """Multi-head attention under a mask, without biases: [B, K, D] -> [B, K, D]."""

    def __init__(self, width: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(width, 3 * width, bias=False)  # rows: queries, keys, values, each head-major
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, mask: AttentionMask) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.n_head, d // self.n_head).permute(2, 0, 3, 1, 4)
        return self.proj(mask.attend(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Four times as wide inside, GELU, without biases: [B, K, D] -> [B, K, D]."""

    def __init__(self, width: int):
        super().__init__()
        self.fc = nn.Linear(width, 4 * width, bias=False)
        self.proj = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.gelu(self.fc(x)))


class Block(nn.Module):
    """A pre-norm block of the trunk: the residual stream [B, K, D] -> the same after it."""

    def __init__(self, width: int, n_head: int):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width, NORM_EPS), Attention(width, n_head)
        self.ln_2, self.mlp = nn.LayerNorm(width, NORM_EPS), MLP(width)

    def forward(self, h: Tensor, mask: AttentionMask) -> Tensor:
        h = h + self.attn(self.ln_1(h), mask)
        return h + self.mlp(self.ln_2(h))


class HeadBlock(nn.Module):
    """A residual MLP of the prediction head: [B, K, W] -> [B, K, W]."""

    def __init__(self, width: int):
        super().__init__()
        self.ln, self.mlp = nn.LayerNorm(width, NORM_EPS), MLP(width)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.mlp(self.ln(h))


class Head(nn.Module):
    """The prediction head: residual MLP blocks of a width of their own, patch by patch (§4.2)."""

    def __init__(self, shape: AimShape):
        super().__init__()
        self.embed = nn.Linear(shape.d_model, shape.head_width)
        self.blocks = nn.ModuleList(HeadBlock(shape.head_width) for _ in range(shape.head_depth))
        self.ln_f = nn.LayerNorm(shape.head_width, NORM_EPS)
        self.out = nn.Linear(shape.head_width, shape.outputs)

    def forward(self, h: Tensor, positions: Tensor) -> Tensor:
        h = self.embed(h) + positions
        for block in self.blocks:
            h = block(h)
        return self.out(self.ln_f(h))


class AIM(Ordered):
    """Patches in, a regression of the next patch out. `attention` is the pattern in use, set from outside."""

    kernels: ClassVar[tuple[str, ...]] = ("flex",)
    codes: Tensor
    classifier: nn.Module

    def __init__(self, shape: AimShape):
        super().__init__(shape.order, shape.n_ctx)
        self.shape, self.attention, self.flex = shape, shape.attention_patterns[0], flex
        self.fixed: dict[int, Tensor] = {}  # positions by their width, and ImageNet's mean and deviation, where held
        self.colours: tuple[Tensor, ...] = ()
        d = shape.d_model
        self.patch_embed = nn.Linear(shape.patch_values, d)
        self.patch_norm = nn.LayerNorm(d, NORM_EPS)
        self.blocks = nn.ModuleList(Block(d, shape.n_head) for _ in range(shape.n_layer))
        self.ln_f = nn.LayerNorm(d, NORM_EPS)
        if shape.head:
            self.head = Head(shape)
        if shape.target == "codes":
            self.register_buffer("codes", torch.zeros(shape.n_codes, shape.patch_values))
        if shape.n_classes and shape.probe_layers:
            self.classifier = AttentiveProbe(d, shape.probe_heads, shape.n_classes).eval()
        elif shape.n_classes:
            self.classifier = nn.Linear(d, shape.n_classes, bias=False)

    def _apply(self, fn: Callable, recurse: bool = True) -> AIM:
        """What is computed from nothing goes along to a GPU, which would wait for it at every step."""
        super()._apply(fn, recurse)
        device = self.patch_embed.weight.device
        if device.type != "cpu":
            widths = {self.shape.d_model, self.shape.head_width} if self.shape.head else {self.shape.d_model}
            self.fixed = {width: sincos_2d(*self.shape.grid, width).to(device) for width in widths}
            self.colours = colours_on(device)
        return self

    def train(self, mode: bool = True) -> AIM:
        """An attentive class head keeps the statistics it has: a micro-batch's own would make the machine's memory
        and ranks a part of the recipe.
        """
        super().train(mode)
        if self.shape.n_classes:
            self.classifier.eval()
        return self

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> AIM:
        """Xavier-uniform matrices, zero biases, norms of one; a class head of zeros, as Image GPT's."""
        for name, tensor in self.named_parameters():
            kind = name.rsplit(".", 2)[-2]
            if name.startswith("classifier.") and self.shape.probe_layers:
                continue
            if name.startswith("classifier.") or name.endswith("bias"):
                tensor.zero_()
            elif kind.startswith("ln") or kind == "patch_norm":
                tensor.fill_(1.0)
            else:
                nn.init.xavier_uniform_(tensor, generator=generator)
        if self.shape.n_classes and self.shape.probe_layers:
            head = cast(AttentiveProbe, self.classifier)
            head.init_weights(generator)  # zeros would be its dead point
        return self

    def position_embeddings(self, channels: int) -> Tensor:
        """The fixed ones in the order of the sequence, [K, channels]."""
        fixed = self.fixed.get(channels)
        if fixed is None:
            fixed = sincos_2d(*self.shape.grid, channels).to(self.patch_embed.weight.device)
        return fixed if self.order is None else fixed[self.order]

    def patches(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] -> patches along the sequence, float32 [B, K, P], by ImageNet's mean and deviation."""
        mean, std = self.colours or colours_on(images.device)
        return self.to_sequence(patchify((images.float() / 255 - mean) / std, self.shape.patch_size))

    def forward(
        self,
        images: Tensor,
        masked: Tensor | None = None,
        logits: bool = True,
        pooled: bool = False,
        unpooled: bool = False,
        first: int = 0,
        last: int | None = None,
    ) -> Output:
        """uint8 [B, H, W, 3] -> what was asked for, with the attention pattern in use.

        masked bool [B, K] along the sequence, False on the prefix: needed by prefix attention. logits [B, K, P or V]
        along the sequence: position p predicts patch p + 1. Layer l of the features is the residual stream after l
        blocks (0: after the embedding), its mean over patches, from `first` on in raster order, or whole. Layers end
        with `last`, and below L nothing is predicted.
        """
        if self.attention == "prefix" and masked is None:
            raise ValueError("prefix attention needs to know the prefix")
        mask = self._attention_mask(masked)
        h = self.patch_norm(self.patch_embed(self.patches(images))) + self.position_embeddings(self.shape.d_model)
        features, probed = [], []
        last = self.shape.n_layer if last is None else last
        for layer in range(last + 1):
            if layer:
                h = self.blocks[layer - 1](h, mask)
            if pooled:
                features.append((self.to_grid(h) if first else h)[:, first:].mean(1, dtype=torch.float32))
            elif unpooled:
                features.append(self.to_grid(h))
            if layer in self.shape.probe_layers:
                probed.append(h)
        if last < self.shape.n_layer:
            return Output(None, features or None, None)
        n = self.ln_f(h)
        predict = logits and self.shape.predicts(self.attention)
        return Output(
            logits=self.head(n, self.position_embeddings(self.shape.head_width)) if predict else None,
            features=features or None,
            class_logits=self._classify(n, probed) if self.shape.n_classes else None,
        )

    def _attention_mask(self, masked: Tensor | None) -> AttentionMask:
        """Of the attention pattern in use; `masked` tells the prefix."""
        if self.attention != "prefix":
            return AttentionMask(causal=self.attention == "causal")
        assert masked is not None
        if not flex_serves(masked, self.shape.d_model // self.shape.n_head):
            return AttentionMask(mask=prefix_mask(masked))
        # a model that is compiled as a whole compiles this with it
        return AttentionMask(mask=prefix_block_mask(masked), flex=flex if torch.compiler.is_compiling() else self.flex)

    def _classify(self, n: Tensor, probed: list[Tensor]) -> Tensor:
        if probed:
            return self.classifier(torch.stack(probed).mean(0).float())[0]
        return self.classifier(n.mean(1, dtype=torch.float32))

    def targets(self, images: Tensor) -> Tensor:
        """What each patch of the sequence is to be predicted as: float32 [B, K, P], or codes int [B, K]."""
        patches = self.patches(images)
        if self.shape.target == "codes":
            return nearest_code(patches, self.codes)
        return normalised(patches)[0] if self.shape.target == "norm-pixels" else patches

    # --- what every family offers, see models/family.py

    @torch.no_grad()
    def fit_codes(self, read: Callable[[np.ndarray], Tensor], count: int, seed: int) -> None:
        """Target "codes": k-means of patches of a random part of the `count` images, which `read` gives by number."""
        if self.shape.target != "codes":
            return
        from sklearn.cluster import MiniBatchKMeans

        rng = np.random.default_rng([seed, 0, Stream.PATCH_CODES])
        some = np.sort(rng.permutation(count)[: max(CODE_PATCHES // self.shape.n_ctx, 1)])
        patches = self.patches(read(some)).flatten(0, 1).numpy()
        if len(patches) < self.shape.n_codes:
            raise UsageError(
                f"model.n_codes is {self.shape.n_codes}, the images have {len(patches)} patches", "choose fewer codes"
            )
        clusters = MiniBatchKMeans(self.shape.n_codes, random_state=seed, n_init=1, batch_size=4096).fit(patches)
        self.codes.copy_(torch.from_numpy(clusters.cluster_centers_))

    def random_images(self, count: int, generator: torch.Generator) -> Tensor:
        """Noise as it would be stored, uint8 [count, H, W, 3]."""
        size = (count, self.shape.height, self.shape.width, 3)
        return torch.randint(256, size, generator=generator, dtype=torch.uint8)

    def prepare(self, images: Tensor) -> Tensor:
        """Pixels as they are stored are what forward takes."""
        return images

    def draw_masks(self, count: int, generator: torch.Generator) -> Tensor | None:
        """Prefix attention: bool [count, K], False on a prefix of S patches, S uniform in 1 .. K - 1 for each image."""
        if self.attention != "prefix":
            return None
        sizes = torch.randint(1, self.shape.n_ctx, (count, 1), generator=generator)
        return torch.arange(self.shape.n_ctx) >= sizes

    def losses(self, output: Output, images: Tensor, masked: Tensor | None) -> Tensor:
        """Sum over each image's scored patches, [B]: of the mean squared error a value, or of nats."""
        per_patch, scored = self.position_losses(output, images, masked)
        return (per_patch * scored).sum(1)

    def scored(self, count: int, masked: Tensor | None) -> int:
        """Scored patches of `count` images: a mean over the batch, so that short prefixes weigh more (as published)."""
        if masked is None:
            return count * (self.shape.n_ctx - 1)
        return int(masked[:, 1:].sum())

    def predictions(self, output: Output, images: Tensor, masked: Tensor | None) -> Tensor:
        """Every patch as it is predicted from those before it, uint8 [B, H, W, 3]; the prefix and the first are given.

        A normalised prediction is shown by the mean and deviation of the true patch, which it does not tell.
        """
        patches = self.patches(images)
        assert output.logits is not None
        shown = output.logits[:, :-1].float()
        if self.shape.target == "codes":
            shown = self.codes[shown.argmax(-1)]
        elif self.shape.target == "norm-pixels":
            _, mean, deviation = normalised(patches[:, 1:])
            shown = shown * deviation + mean
        shown = torch.cat([patches[:, :1], shown], dim=1)
        if masked is not None:
            shown = torch.where(masked[..., None], shown, patches)
        mean, std = self.colours or colours_on(images.device)
        pictures = unpatchify(self.to_grid(shown), self.shape.height, self.shape.width) * std + mean
        return (pictures * 255).round().clamp(0, 255).to(torch.uint8)

    def position_losses(self, output: Output, images: Tensor, masked: Tensor | None) -> tuple[Tensor, Tensor]:
        """The loss of predicting each patch, and whether it is scored, both [B, K] along the sequence."""
        assert output.logits is not None
        predicted, targets = output.logits[:, :-1].float(), self.targets(images)[:, 1:]
        if self.shape.target == "codes":
            loss = F.cross_entropy(predicted.transpose(1, 2), targets, reduction="none")
        else:
            loss = F.mse_loss(predicted, targets, reduction="none").mean(-1)
        scored = torch.ones_like(loss, dtype=torch.bool) if masked is None else masked[:, 1:]
        return F.pad(loss, (1, 0)), F.pad(scored, (1, 0))


def colours_on(device: torch.device) -> tuple[Tensor, ...]:
    """ImageNet's mean and deviation of each channel."""
    return tuple(torch.tensor(values, device=device) for values in (MEAN, STD))


def nearest_code(patches: Tensor, codes: Tensor) -> Tensor:
    """[B, K, P], [V, P] -> the nearest code of each patch, int [B, K]."""
    distance = codes.square().sum(1) - 2 * patches @ codes.T
    return distance.argmin(-1)
