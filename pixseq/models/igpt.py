"""Image GPT, as published ("Generative Pretraining from Pixels", §2 and the released code).

Shapes: B images, T positions, D width, H heads, K head width (D / H), V colours, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixseq.errors import UsageError
from pixseq.models import branches, gradients, inference
from pixseq.models.attention import self_attention
from pixseq.models.flops import COUNTING, training_flops
from pixseq.models.inference import NORM_EPS, SLOPE
from pixseq.models.objectives import generative_nats, random_mask, scored_images, token_nats
from pixseq.models.order import Ordered
from pixseq.models.output import Output


@dataclass(frozen=True)
class IgptShape:
    """What fixes every tensor of the model. `n_ctx` is T, `n_vocab` V; objective is "ar" or "bert" (bert: no sos).

    Weights from elsewhere may lack the prediction head (`head` False: no logits), or be a classifier that was trained
    on pixel p at position p (`shifted` False), where this model puts it at p + 1.
    """

    n_layer: int
    n_head: int
    d_model: int
    n_vocab: int
    n_ctx: int
    objective: str = "ar"
    n_classes: int = 0
    head: bool = True
    shifted: bool = True
    order: str = "raster"
    reads: ClassVar[str] = "tokens"  # the kind of artifact it is trained on
    hidden_states: ClassVar[str] = "ln_1 output entering the block; the last layer: ln_f output"  # its features
    family: str = "igpt"

    @property
    def pretraining_attention(self) -> str:
        """The attention pattern of pretraining."""
        return "causal" if self.objective == "ar" else "bidirectional"

    @property
    def attention_patterns(self) -> tuple[str, ...]:
        """The attention patterns it can be used with, its default first."""
        return (self.pretraining_attention,)

    @property
    def can_sample(self) -> bool:
        """Whether it can be sampled."""
        return self.objective == "ar"

    @property
    def masks(self) -> int:
        """Random masks an image is seen under where features and votes are made of it (§4.6)."""
        return 5 if self.objective == "bert" else 1

    def needs_mask(self, attention: str) -> bool:
        """Whether forward needs a mask, of random positions, with this attention."""
        return self.objective == "bert"

    def predicts(self, attention: str) -> bool:
        """Whether there is a pretraining loss with this attention."""
        return self.head

    def adapted_to(self, attention: str) -> IgptShape:
        """The same model with another default pattern of use: Image GPT has but one."""
        return self

    def for_pretraining(self) -> IgptShape:
        """The same model without a class head, and with a prediction head, to train it on.

        Raises UsageError where position p sees pixel p: it has nothing to predict.
        """
        if not self.shifted:
            raise UsageError(
                "it is a classifier whose positions see their own pixels, which leaves nothing to predict",
                "start from a model that was trained to predict them",
            )
        return replace(self, n_classes=0, head=True)

    def report(self, nats: float, channels: int) -> dict[str, float]:
        """A mean loss in the units it is told in. rgb has three tokens a pixel, the other schemes one."""
        bits = nats / math.log(2)
        if channels == 3:
            return {"nats_per_token": nats, "bits_per_dim": bits, "bits_per_pixel": 3 * bits}
        return {"nats_per_token": nats, "bits_per_pixel": bits}

    @classmethod
    def of(cls, config: Mapping[str, Any], grid: tuple[int, int, int], n_vocab: int | None, order: str) -> IgptShape:
        """The shape of a configuration on tokens: vocabulary and context come from them."""
        assert n_vocab is not None  # tokens have one
        return cls(**config, n_vocab=n_vocab, n_ctx=math.prod(grid), order=order)

    def config(self) -> dict[str, Any]:
        """The configuration that `of` makes this shape from."""
        return {key: getattr(self, key) for key in ("n_layer", "n_head", "d_model", "objective")}

    def positions(self) -> None:
        """None are fixed: all are learned."""

    def sequence_grid(self, grid: tuple[int, int, int]) -> tuple[int, int, int]:
        """Rows, columns and positions a cell of the picture that the sequence runs over."""
        return grid

    def parameter_count(self) -> int:
        """The paper's sizes, e.g. 76,571,648 for iGPT-S; plus the class head where there is one."""
        d = self.d_model
        embeddings = self.n_ctx * d + (1 + self.head) * self.n_vocab * d + (d if self.objective == "ar" else 0)
        return embeddings + self.n_layer * (12 * d * d + 2 * d) + d + self.n_classes * d

    def trunk_count(self) -> int:
        """The parameters that scaling laws count as N: all but a class head."""
        return self.parameter_count() - self.n_classes * self.d_model

    def block_count(self) -> int:
        """The weights of the blocks' matrices: N without embeddings, as Kaplan counts."""
        return 12 * self.n_layer * self.d_model**2

    def flops_per_token(self, counting: str = COUNTING) -> int:
        """Training floating point operations a token, see flops.py."""
        multiplied = self.block_count() + self.n_vocab * self.d_model
        sizes = (self.n_layer, self.d_model, self.n_ctx)
        return training_flops(counting, self.trunk_count(), multiplied, *sizes, causal=self.objective == "ar")

    def activation_bytes(self, width: int) -> int:
        """What training on one image holds, in numbers of `width` bytes: a rough count.

        Of the 18 D a position and layer, the gradients of branches.py take some 11; plain autograd takes 23 in float32,
        and in bf16, whose stream and norms stay in float32, up to 33.
        """
        return self.n_ctx * (width * self.d_model * self.n_layer * 18 + self.n_vocab * (8 + width))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * g: no mean subtraction and no bias, whatever the released docstring says."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        if gradients.takes_own_gradient(x):
            return gradients.RMSNorm.apply(x, self.weight, NORM_EPS)
        return F.rms_norm(x, self.weight.shape, self.weight, NORM_EPS)


def quick_gelu(x: Tensor) -> Tensor:
    """The released model's activation; the exact GELU differs from it by up to 0.02."""
    return x * torch.sigmoid(SLOPE * x)


class Attention(nn.Module):
    def __init__(self, width: int, n_head: int, causal: bool):
        super().__init__()
        self.n_head, self.causal = n_head, causal
        self.qkv = nn.Linear(width, 3 * width, bias=False)  # rows: queries, keys, values, each head-major
        self.proj = nn.Linear(width, width, bias=False)

    def attend(self, qkv: Tensor) -> Tensor:
        """[B, T, 3 D] -> [B, T, D]."""
        return self_attention(qkv, self.n_head, self.causal)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.attend(self.qkv(x)))


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc = nn.Linear(width, 4 * width, bias=False)
        self.proj = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if gradients.takes_own_gradient(x) and type(self.fc) is type(self.proj) is nn.Linear:
            # quick-gelu is silu(1.702 x) / 1.702: scales of the weights, and one pass each way over what is between
            inner = F.silu(F.linear(x, SLOPE * self.fc.weight))
            return F.linear(inner, self.proj.weight / SLOPE)
        return self.proj(quick_gelu(self.fc(x)))


class Block(nn.Module):
    """`frozen`: its weights are those of inference.py, which alone can take it."""

    frozen = False

    def __init__(self, width: int, n_head: int, causal: bool):
        super().__init__()
        self.ln_1, self.attn = RMSNorm(width), Attention(width, n_head, causal)
        self.ln_2, self.mlp = RMSNorm(width), MLP(width)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the block's output and n^l, the normalised input its attention saw."""
        assert not self.frozen
        n = self.ln_1(h)
        h = h + self.attn(n)
        return h + self.mlp(self.ln_2(h)), n


class ImageGPT(Ordered):
    """Logits for every pixel of an image.

    ar: the input is [sos, x_1 .. x_{T-1}], so that position p predicts pixel p from those before it; the last pixel is
    never an input. bert: masked positions lose their content embedding and keep their position; attention sees all.
    Pixels run in raster order, or in that of `shape.order`: wpe belongs to the place in the picture.
    """

    def __init__(self, shape: IgptShape):
        super().__init__(shape.order, shape.n_ctx)
        self.shape, self.attention = shape, shape.pretraining_attention
        d = shape.d_model
        self.wte = nn.Parameter(torch.empty(shape.n_vocab, d))
        self.wpe = nn.Parameter(torch.empty(shape.n_ctx, d))
        if shape.objective == "ar":
            self.sos = nn.Parameter(torch.empty(d))
        blocks = nn.ModuleList(Block(d, shape.n_head, shape.objective == "ar") for _ in range(shape.n_layer))
        self.blocks = cast(Sequence[Block], blocks)  # a list of modules does not tell of which
        self.ln_f = RMSNorm(d)
        if shape.head:
            self.head = nn.Linear(d, shape.n_vocab, bias=False)  # untied from wte
        if shape.n_classes:
            self.classifier = nn.Linear(d, shape.n_classes, bias=False)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> ImageGPT:
        """Every tensor's law in one place: normal with mean 0, these standard deviations (0: zeros); norms are ones."""
        d, layers = self.shape.d_model, self.shape.n_layer
        std = {
            "wte": 0.02,
            "wpe": 0.01,
            "sos": 0.02,
            "attn.qkv.weight": d**-0.5,
            "attn.proj.weight": (d * layers) ** -0.5,  # the only one scaled by depth in the released code
            "mlp.fc.weight": 0.02,
            "mlp.proj.weight": 0.02,
            "head.weight": 0.0,
            "classifier.weight": 0.0,
        }
        for name, tensor in self.named_parameters():
            if name.rpartition(".")[0].rpartition(".")[2].startswith("ln_"):
                tensor.fill_(1.0)
                continue
            law = next(value for suffix, value in std.items() if name == suffix or name.endswith("." + suffix))
            if law:
                tensor.normal_(0.0, law, generator=generator)
            else:
                tensor.zero_()
        return self

    def position_embeddings(self) -> Tensor:
        """wpe in the order of the sequence, [T, D]."""
        return self.wpe if self.order is None else self.wpe[self.order]

    def freeze(self, dtype: torch.dtype) -> None:
        """On a CPU, what multiplies the input of a block's matrix is multiplied into it, too."""
        if self.wte.device.type == "cpu" and inference.are_plain(self.blocks):
            inference.freeze(self.blocks, dtype)
        super().freeze(dtype)

    def embed(self, tokens: Tensor, masked: Tensor | None = None) -> Tensor:
        """tokens int [B, T] and masked bool [B, T] (bert) in the order of the sequence -> h^0 [B, T, D]."""
        if self.shape.objective == "ar" and self.shape.shifted:
            content = F.embedding(F.pad(tokens[:, :-1], (1, 0)), self.wte)
            content[:, 0] = self.sos
        else:
            content = F.embedding(tokens, self.wte)
            if masked is not None:
                content = content * ~masked[..., None]
        return content.add_(self.position_embeddings()[: tokens.shape[1]])

    def forward(
        self,
        tokens: Tensor,
        masked: Tensor | None = None,
        logits: bool = True,
        pooled: bool = False,
        unpooled: bool = False,
        first: int = 0,
        last: int | None = None,
    ) -> Output:
        """tokens int [B, T] -> what was asked for: logits, and every n^l, its mean over positions or whole.

        The hidden states that features are made of come from here, no hook is needed: layer l is the ln_1 output that
        enters block l; layer L is the ln_f output (§2.2, §2.4). Means are of the positions from `first` on. Layers end
        with `last`, and below L nothing is predicted.
        """
        h = self.embed(self.to_sequence(tokens), None if masked is None else self.to_sequence(masked))

        def read(n: Tensor) -> Tensor:
            if pooled:
                return (self.to_grid(n) if first else n)[:, first:].mean(1, dtype=torch.float32)
            return self.to_grid(n) if unpooled else n[:, :0].clone()

        last = self.shape.n_layer if last is None else last
        blocks, norm = list(self.blocks)[:last], self.ln_f if last == self.shape.n_layer else self.blocks[last].ln_1
        features: list[Tensor] = []
        if inference.applies(blocks, h):
            features, n = inference.run(blocks, norm.weight, h, read), h
        elif not (pooled or unpooled) and branches.applies(blocks, h):
            n = norm(branches.run(blocks, h))
        else:
            for block in blocks:
                h, n = block(h)
                features.append(read(n))
            n = norm(h)
            features.append(read(n))
        asked = features if pooled or unpooled else None
        if last < self.shape.n_layer:
            return Output(None, asked, None)
        return Output(
            logits=self.to_grid(self.head(n)) if logits and self.shape.head else None,
            features=asked,
            class_logits=self.classifier(n.mean(1, dtype=torch.float32)) if self.shape.n_classes else None,
        )

    # --- what every family offers, see models/family.py

    def fit_codes(self, read: Callable, count: int, seed: int) -> None:
        """Nothing: the tokens are given."""

    def random_images(self, count: int, generator: torch.Generator) -> Tensor:
        """Noise as it would be stored, int [count, T]."""
        return torch.randint(self.shape.n_vocab, (count, self.shape.n_ctx), generator=generator)

    def prepare(self, images: Tensor) -> Tensor:
        """Tokens as they are stored -> what forward takes."""
        return images.long()

    def draw_masks(self, count: int, generator: torch.Generator) -> Tensor | None:
        """bert: bool [count, T], True where the content is hidden; ar: None."""
        if self.shape.objective == "ar":
            return None
        return random_mask(count, self.shape.n_ctx, generator)

    def losses(self, output: Output, tokens: Tensor, masked: Tensor | None) -> Tensor:
        """Mean nats a token of each image, [B]."""
        assert output.logits is not None
        return generative_nats(output.logits, tokens, masked)

    def scored(self, count: int, masked: Tensor | None) -> int:
        """What the sum of `losses` over `count` images is divided by."""
        return scored_images(count, masked)

    def predictions(self, output: Output, tokens: Tensor, masked: Tensor | None) -> Tensor:
        """The likeliest token at each place, int [B, T]; bert: the given ones where nothing is hidden."""
        assert output.logits is not None
        likeliest = output.logits.argmax(-1)
        return likeliest if masked is None else torch.where(masked, likeliest, tokens)

    def position_losses(self, output: Output, tokens: Tensor, masked: Tensor | None) -> tuple[Tensor, Tensor]:
        """Nats of each token and whether it is scored, both [B, T], along the sequence."""
        assert output.logits is not None
        nats = token_nats(output.logits, tokens)
        scored = torch.ones_like(tokens, dtype=torch.bool) if masked is None else masked
        return self.to_sequence(nats), self.to_sequence(scored)
