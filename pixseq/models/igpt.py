"""Image GPT, as published ("Generative Pretraining from Pixels", §2 and the released code).

Shapes: B images, T positions, D width, H heads, K head width (D / H), V colours, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-5


@dataclass(frozen=True)
class Shape:
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

    def parameter_count(self) -> int:
        """The paper's sizes, e.g. 76,571,648 for iGPT-S; plus the class head where there is one."""
        d = self.d_model
        embeddings = self.n_ctx * d + (1 + self.head) * self.n_vocab * d + (d if self.objective == "ar" else 0)
        return embeddings + self.n_layer * (12 * d * d + 2 * d) + d + self.n_classes * d

    def flops_per_token(self) -> int:
        """Training floating point operations a token: 6 per weight in a matrix product, attention counted causally."""
        d = self.d_model
        attention = self.n_layer * d * self.n_ctx * (6 if self.objective == "ar" else 12)
        return 6 * (12 * self.n_layer * d * d + self.n_vocab * d) + attention


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * g: no mean subtraction and no bias, whatever the released docstring says."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, NORM_EPS)


def quick_gelu(x: Tensor) -> Tensor:
    """The released model's activation; the exact GELU differs from it by up to 0.02."""
    return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    def __init__(self, width: int, n_head: int, causal: bool):
        super().__init__()
        self.n_head, self.causal = n_head, causal
        self.qkv = nn.Linear(width, 3 * width, bias=False)  # rows: queries, keys, values, each head-major
        self.proj = nn.Linear(width, width, bias=False)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, D] -> queries, keys, values, each [B, H, T, K]."""
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.n_head, d // self.n_head).permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(*self.heads(x), is_causal=self.causal)
        return self.proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc = nn.Linear(width, 4 * width, bias=False)
        self.proj = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(quick_gelu(self.fc(x)))


class Block(nn.Module):
    def __init__(self, width: int, n_head: int, causal: bool):
        super().__init__()
        self.ln_1, self.attn = RMSNorm(width), Attention(width, n_head, causal)
        self.ln_2, self.mlp = RMSNorm(width), MLP(width)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the block's output and n^l, the normalised input its attention saw."""
        n = self.ln_1(h)
        h = h + self.attn(n)
        return h + self.mlp(self.ln_2(h)), n


class ImageGPT(nn.Module):
    """Logits for every pixel of an image.

    ar: the input is [sos, x_1 .. x_{T-1}], so that position p predicts pixel p from those before it; the last pixel is
    never an input. bert: masked positions lose their content embedding and keep their position; attention sees all.
    """

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        d = shape.d_model
        self.wte = nn.Parameter(torch.empty(shape.n_vocab, d))
        self.wpe = nn.Parameter(torch.empty(shape.n_ctx, d))
        if shape.objective == "ar":
            self.sos = nn.Parameter(torch.empty(d))
        self.blocks = nn.ModuleList(Block(d, shape.n_head, shape.objective == "ar") for _ in range(shape.n_layer))
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

    def embed(self, tokens: Tensor, masked: Tensor | None = None) -> Tensor:
        """tokens int [B, T], masked bool [B, T] (bert) -> h^0 [B, T, D]."""
        content = F.embedding(tokens, self.wte)
        if self.shape.objective == "ar" and self.shape.shifted:
            sos = self.sos.to(content.dtype).expand(len(tokens), 1, -1)
            content = torch.cat([sos, content[:, :-1]], dim=1)
        elif masked is not None:
            content = content * ~masked[..., None]
        return content + self.wpe[: tokens.shape[1]]

    def forward(
        self, tokens: Tensor, masked: Tensor | None = None, logits: bool = True, pooled: bool = False
    ) -> Output:
        """tokens int [B, T] -> what was asked for: logits, and with `pooled` the mean over positions of every n^l.

        Layer l of the features is the ln_1 output that enters block l; layer L is the ln_f output (§2.2, §2.4).
        """
        h = self.embed(tokens, masked)
        features = []
        for block in self.blocks:
            h, n = block(h)
            if pooled:
                features.append(n.mean(1, dtype=torch.float32))
        n = self.ln_f(h)
        mean = n.mean(1, dtype=torch.float32)
        return Output(
            logits=self.head(n) if logits and self.shape.head else None,
            features=[*features, mean] if pooled else None,
            class_logits=self.classifier(mean) if self.shape.n_classes else None,
        )


@dataclass
class Output:
    """What one forward pass gives; None for what was not asked for or does not exist."""

    logits: Tensor | None  # [B, T, V]; position p predicts pixel p
    features: list[Tensor] | None  # L + 1 of [B, D], float32
    class_logits: Tensor | None  # [B, classes], on the pooled ln_f output
