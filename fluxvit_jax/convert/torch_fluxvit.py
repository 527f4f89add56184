"""FluxViT in plain PyTorch: a video transformer that runs on any grid and at any token budget.

This file needs PyTorch and, to load weights, safetensors. In a folder with `config.json` and
`model.safetensors` it is complete:

    model = FluxViT.from_folder(".")             # float32, eval mode
    video = torch.from_numpy(frames)             # uint8 [T, Y, X, 3], Y and X multiples of 14
    logits, pooled = model(video, tokens=1024)   # [1, classes], [1, 768]
    kept = model.select(video, tokens=1024)      # bool [1, T, Y / 14, X / 14]
    vectors = model.encode_video(video, tokens=1024)  # unit, [1, D], with clip.safetensors
    torch.onnx.export(model, (video,), "model.onnx", kwargs={"tokens": 1024}, dynamo=True)

An exported program is for videos of one shape and for one budget. The parameters have the names
and shapes of the official release, so its state dict loads as well. Of Flux-CLIP, the folder has
`clip.safetensors` too. Its tensors `text_encoder.*` are those of MobileCLIP-B's text encoder, which
MobileCLIP's own code runs: texts' vectors, once normalized, compare with these by dot products.

Letters in shapes: B clips, T frames, H W patch rows and columns, N kept tokens, C width.
"""

import hashlib
import inspect
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

PATCH = 14  # pixels a side; a patch is of one frame
MEAN = (0.485, 0.456, 0.406)  # ImageNet, for values in 0..1
STD = (0.229, 0.224, 0.225)
CHOICES = {
    "gelu": ("tanh", "erf"),
    "cls": ("outside", "inside"),
    "selector": ("group_dynamic", "dynamic_l1", "dynamic_l2", "tube", "random", "none"),
    "rounding": ("exact", "official"),
}


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in float32; returns the dtype of x."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        high = x.float()
        mean_square = high.square().mean(-1, keepdim=True)
        return (high * torch.rsqrt(mean_square + 1e-6) * self.weight).to(x.dtype)


class LayerScale(nn.Module):
    """x * gamma, multiplied in float32; returns the dtype of x."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() * self.gamma).to(x.dtype)


class Depthwise(nn.Module):
    """A depthwise convolution of size 1 x 1 x 1: a scale and a bias for each channel.

    Applied as just that, it needs no grid: x is [..., C], in any order of tokens.
    """

    def __init__(self, width: int):
        super().__init__()
        self.depthwise_conv = nn.Conv3d(width, width, 1, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        scale, bias = self.depthwise_conv.weight.flatten(), self.depthwise_conv.bias
        assert bias is not None
        return x * scale + bias


class PatchEmbed(nn.Module):
    """Dual patch norm: RMSNorm, linear projection, RMSNorm."""

    def __init__(self, width: int):
        super().__init__()
        size = (1, PATCH, PATCH)
        self.norm_before = RMSNorm(3 * PATCH**2)
        self.proj = nn.Conv3d(3, width, size, stride=size)
        self.norm = RMSNorm(width)

    def forward(self, video: Tensor) -> Tensor:
        """Normalised video [B, T, 14 H, 14 W, 3] -> [B, T, H, W, C]."""
        patches = video.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH)).transpose(3, 4)
        x = self.norm_before(patches.flatten(4))  # the values of a patch in the order y, x, colour
        kernel = self.proj.weight.permute(0, 2, 3, 4, 1).flatten(1)
        return self.norm(F.linear(x.to(kernel.dtype), kernel, self.proj.bias))


class Attention(nn.Module):
    """Self-attention with RMS-normalised q and k and the local position term (LPE) on v."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm = RMSNorm(width)  # over all heads together
        self.k_norm = RMSNorm(width)
        self.lpe = Depthwise(width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        attended = attend(self.q_norm(q), self.k_norm(k), v, self.heads)
        return self.proj(attended + self.lpe(v))


class MLP(nn.Module):
    """Two linear layers with GELU between."""

    def __init__(self, width: int, gelu: str):
        super().__init__()
        self.gelu = nn.GELU("tanh" if gelu == "tanh" else "none")
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block with LayerScale. [B, N, C] -> [B, N, C]."""

    def __init__(self, width: int, heads: int, gelu: str):
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width)
        self.norm2 = RMSNorm(width)
        self.mlp = MLP(width, gelu)
        self.ls2 = LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class CrossAttention(nn.Module):
    """Attention of given queries, with the biases as parameters of their own."""

    def __init__(self, width: int, out: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.q_bias, self.k_bias, self.v_bias = (nn.Parameter(torch.zeros(width)) for _ in range(3))
        self.proj = nn.Linear(width, out)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries [B, M, C], keys and values [B, N, C] -> [B, M, out]."""
        q, k, v = self.q(q) + self.q_bias, self.k(k) + self.k_bias, self.v(v) + self.v_bias
        return self.proj(attend(q, k, v, self.heads))


class AttentionPool(nn.Module):
    """One query, the mean of all tokens, attends to them: [B, N, C] -> [B, out]."""

    def __init__(self, width: int, out: int, heads: int):
        super().__init__()
        self.norm1_q, self.norm1_k, self.norm1_v = (nn.LayerNorm(width) for _ in range(3))
        self.cross_attn = CrossAttention(width, out, heads)

    def forward(self, x: Tensor) -> Tensor:
        query = self.norm1_q(x.mean(1, keepdim=True))
        return self.cross_attn(query, self.norm1_k(x), self.norm1_v(x))[:, 0]


class AlignProjector(nn.Module):
    """Linear, LayerNorm, L2 normalisation: [B, E] -> unit [B, E]."""

    def __init__(self, width: int):
        super().__init__()
        self.head = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.norm(self.head(x)), dim=-1)


class FluxViT(nn.Module):
    """The network. It starts without trained values: load a state dict, or use `from_folder`.

    frames, rows, columns: the grid that the position table is laid out on.
    budgets: pooling heads and classifiers; head_budgets: the tokens that each was trained at.
    gelu: "tanh", as the released weights were trained, or "erf".
    cls: "outside" adds the CLS token to a budget, "inside" lets it take one place.
    groups: groups of frames that share a budget; 0: as many as the clip's frames allow, up to 4.
    rounding: "exact" fills a budget; "official" keeps up to four tokens fewer, as the release does.
    text_encoder: of Flux-CLIP, its sizes; "out" is the width of the vectors of videos and texts.
    """

    def __init__(
        self, *, width: int, depth: int, heads: int, frames: int, rows: int, columns: int,
        classes: int, budgets: int = 3, pool_width: int = 768, pool_heads: int = 16,
        gelu: str = "tanh", cls: str = "outside", selector: str = "group_dynamic",
        groups: int = 0, rounding: str = "exact",
        head_budgets: Sequence[int] = (3072, 2048, 1024),
        text_encoder: Mapping[str, int] | None = None,
    ):  # fmt: skip
        super().__init__()
        check(gelu=gelu, cls=cls, selector=selector, rounding=rounding)
        self.native, self.cls = (frames, rows, columns), cls
        self.selector, self.groups, self.rounding = selector, groups, rounding
        self.head_budgets = tuple(head_budgets)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + math.prod(self.native), width))
        self.gpe_proj = Depthwise(width)
        self.patch_embed = PatchEmbed(width)
        self.blocks = nn.ModuleList(Block(width, heads, gelu) for _ in range(depth))
        self.clip_projector = nn.ModuleList(
            AttentionPool(width, pool_width, pool_heads) for _ in range(budgets)
        )
        self.fc_norm = nn.LayerNorm(pool_width)
        self.head = nn.ModuleList(nn.Linear(pool_width, classes) for _ in range(budgets))
        self.final_clip_decoder_for_projs = nn.ModuleList(
            AlignProjector(pool_width) for _ in range(max(budgets - 1, 1))
        )
        if text_encoder:
            self.vision_align = nn.Sequential(
                nn.LayerNorm(pool_width), nn.Linear(pool_width, text_encoder["out"])
            )

    @classmethod
    def from_folder(cls, folder: str | Path, /, **changes: Any) -> "FluxViT":
        """The model of `config.json` with the weights of `model.safetensors`, in eval mode.

        changes: fields that differ from the config's. The weights become float32, whatever the
        file holds. RuntimeError names every tensor that is missing, unexpected or misshapen, or
        says that `clip.safetensors` belongs to other weights.
        """
        from safetensors.torch import load_file

        config = json.loads((Path(folder) / "config.json").read_text())
        known = inspect.signature(cls).parameters
        with torch.device("meta"):  # every tensor comes from the file, so none is made here
            model = cls(**{key: config[key] for key in known if key in config} | changes)
        state = load_file(Path(folder) / "model.safetensors")
        if hasattr(model, "vision_align"):
            state |= read_video_head(Path(folder))
        model.load_state_dict({name: x.float() for name, x in state.items()}, assign=True)
        return model.eval()

    def forward(
        self,
        video: Tensor,
        tokens: int | None = None,
        head: int | None = None,
        rounding: str | None = None,
        normalized: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, classes] and clip vectors [B, pool_width] at a budget of `tokens`.

        video: uint8 [B, T, 14 H, 14 W, 3], or with `normalized` float; B may be left out.
        tokens: None keeps all. head: None takes the one trained at the nearest budget.
        normalized: the video is (pixels / 255 - MEAN) / STD already.
        """
        patches = self.embed(video, normalized)
        index = None if tokens is None else self._kept(patches, tokens, rounding)
        if head is None:
            head = self.nearest_head(math.prod(patches.shape[1:4]) if tokens is None else tokens)
        pooled = self.clip_projector[head](self.encode(patches, index))
        return self.head[head](self.fc_norm(pooled)), pooled

    def encode_video(
        self,
        video: Tensor,
        tokens: int | None = None,
        head: int | None = None,
        rounding: str | None = None,
        normalized: bool = False,
    ) -> Tensor:
        """Unit vectors in the space of texts, [B, D], of Flux-CLIP. Arguments as `forward`."""
        if not hasattr(self, "vision_align"):
            raise ValueError("these weights have no text encoder: they are not of Flux-CLIP")
        _, pooled = self(video, tokens, head, rounding, normalized)
        return F.normalize(self.vision_align(pooled), dim=-1)

    def select(
        self, video: Tensor, tokens: int, rounding: str | None = None, normalized: bool = False
    ) -> Tensor:
        """The patches that a budget of `tokens` keeps: bool [B, T, H, W]. video: as `forward`."""
        patches = self.embed(video, normalized)
        index = self._kept(patches, tokens, rounding)
        dropped = torch.ones(patches.shape[:-1], dtype=torch.bool, device=patches.device)
        return ~dropped.flatten(1).scatter(1, index, False).view_as(dropped)

    def project(self, pooled: Tensor, projector: int) -> Tensor:
        """A smaller budget's clip vector made comparable with the largest's: unit [B, E]."""
        return self.final_clip_decoder_for_projs[projector](pooled)

    def nearest_head(self, tokens: int) -> int:
        """The head whose budget is nearest in ratio; ties to the first."""
        ratios = [abs(math.log(tokens / budget)) for budget in self.head_budgets]
        return ratios.index(min(ratios))

    def embed(self, video: Tensor, normalized: bool = False) -> Tensor:
        """The patches before positions, [B, T, H, W, C]. video: as `forward`."""
        return self.patch_embed(as_input(video, normalized))

    def encode(self, patches: Tensor, index: Tensor | None = None) -> Tensor:
        """The tokens after the last block: [B, 1 + N, C], CLS first.

        patches: [B, T, H, W, C]; index: int64 [B, N], the kept places in order t, h, w, or None.
        """
        x = (patches + self.positions(*patches.shape[1:4]).to(patches.dtype)).flatten(1, 3)
        if index is not None:
            x = x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
        cls = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls.expand(x.shape[0], -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return x

    def positions(self, frames: int, rows: int, columns: int) -> Tensor:
        """The position table after GPE, resized to a grid: float32 [T, H, W, C]."""
        table = self.gpe_proj(self.pos_embed[0, 1:]).float().unflatten(0, self.native)
        table = F.interpolate(
            table.permute(0, 3, 1, 2), (rows, columns), mode="bicubic", align_corners=False
        )
        places = table.permute(2, 3, 1, 0).flatten(0, 1)  # [H * W, C, native frames]
        places = F.interpolate(places, frames, mode="linear", align_corners=False)
        return places.unflatten(0, (rows, columns)).permute(3, 0, 1, 2)

    def _kept(self, patches: Tensor, tokens: int, rounding: str | None) -> Tensor:
        """The places that a budget keeps, in order t, h, w: int64 [B, N]."""
        if tokens < 1:
            raise ValueError(f"a budget is at least 1 token, not {tokens}")
        patches = patches.detach()
        _, frames, rows, columns, _ = patches.shape
        groups = group_frames(frames, self.groups) if self.selector == "group_dynamic" else [frames]
        sizes = [group * rows * columns for group in groups]
        places = tokens - (self.cls == "inside")
        budget = kept_tokens(sum(sizes), len(sizes), places, rounding or self.rounding)
        starts = itertools.accumulate(sizes[:-1], initial=0)
        parts = zip(patches.split(groups, 1), shares(sizes, budget), starts, strict=True)
        kept = [start + best(self._scores(part).flatten(1), share) for part, share, start in parts]
        return torch.cat(kept, dim=1)

    def _scores(self, group: Tensor) -> Tensor:
        """The score of each token of a group of frames, the highest to be kept first.

        [B, T, H, W, C] -> float32 [B, T, H, W]: how far a patch is from the one a frame before.
        The first frame has the scores of the second; a single frame has no motion and scores 0.
        """
        B, T, H, W, _ = group.shape
        if self.selector in ("random", "tube"):  # a tube is alike in every frame
            drawn = 1 if self.selector == "tube" else T
            return torch.rand(B, drawn, H, W, device=group.device).expand(B, T, H, W)
        if self.selector == "none" or T == 1:
            return torch.zeros(B, T, H, W, device=group.device)
        change = group[:, 1:].float() - group[:, :-1].float()
        order = 1 if self.selector == "dynamic_l1" else 2
        distance = torch.linalg.vector_norm(change, ord=order, dim=-1)
        return torch.cat([distance[:, :1], distance], dim=1)


def read_video_head(folder: Path) -> dict[str, Tensor]:
    """The tensors that lead from clip vectors into the space of texts, of a folder of Flux-CLIP.

    RuntimeError if they belong to another network than the folder's.
    """
    from safetensors import safe_open

    with safe_open(folder / "clip.safetensors", framework="pt") as file:
        belongs_to = json.loads(file.metadata()["fluxvit_jax"])["model_sha256"]
        names = [name for name in file.keys() if name.startswith("vision_align.")]  # noqa: SIM118
        head = {name: file.get_tensor(name) for name in names}
    if hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() != belongs_to:
        raise RuntimeError(f"{folder}: clip.safetensors belongs to another model.safetensors")
    return head


def check(**chosen: str) -> None:
    """ValueError for a word that its field does not know."""
    for field, word in chosen.items():
        if word not in CHOICES[field]:
            known = ", ".join(CHOICES[field])
            raise ValueError(f"{field} is {word!r} but must be one of {known}")


def as_input(video: Tensor, normalized: bool = False) -> Tensor:
    """A video as the network takes it: normalized floats [B, T, 14 H, 14 W, 3].

    video: uint8, or with `normalized` float, [B, T, Y, X, 3] or [T, Y, X, 3].
    """
    shape = tuple(video.shape)
    if len(shape) not in (4, 5) or shape[-1] != 3:
        raise ValueError(f"a video is [T, Y, X, 3] or [B, T, Y, X, 3], but its shape is {shape}")
    if shape[-3] % PATCH or shape[-2] % PATCH:
        raise ValueError(
            f"frames of {shape[-3]} x {shape[-2]} pixels cannot be cut into patches: "
            f"resize both sides to multiples of {PATCH}"
        )
    # By type alone: an exported program cannot look at the values.
    if normalized != video.is_floating_point() or not (normalized or video.dtype == torch.uint8):
        raise ValueError(
            f"this video is {video.dtype}, with normalized={normalized}: pass uint8 pixels "
            "(0 to 255), or with normalized=True floats that are (pixels / 255 - MEAN) / STD"
        )
    if not normalized:
        mean, std = (torch.tensor(values, device=video.device) for values in (MEAN, STD))
        video = (video.float() / 255 - mean) / std
    return video if len(shape) == 5 else video[None]


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention with the heads side by side in C: [B, M, C], twice [B, N, C] -> [B, M, C]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def best(scores: Tensor, share: int) -> Tensor:
    """The places of the `share` highest scores, ascending; ties to the earlier. [B, P] -> [B, N].

    Ties are the rule, since a group's first frame has the scores of its second. A stable sort
    would settle them, but ONNX export has none.
    """
    cut = scores.topk(max(share, 1)).values[:, -1:]
    above, level = scores > cut, scores == cut
    kept = above | (level & (level.cumsum(1) <= share - above.sum(1, keepdim=True)))
    earliness = torch.arange(scores.shape[1], 0, -1, device=scores.device)
    return (kept * earliness).topk(share).indices


def group_frames(frames: int, groups: int = 0) -> list[int]:
    """Frames in each of the consecutive groups that share a budget.

    Four groups where 4 divides the frames, else two, or `groups`; as near to equal as can be, and
    never of one frame beside others, since it would have no predecessor to be compared with.
    """
    count = max(1, min(groups or (4 if frames % 4 == 0 else 2), frames // 2))
    return [b - a for a, b in itertools.pairwise(g * frames // count for g in range(count + 1))]


def kept_tokens(total: int, groups: int, places: int, rounding: str) -> int:
    """Tokens that are kept of `total`, in `groups` groups, when there are `places` for them.

    "official" is the arithmetic of the release, float64 and truncated in each group.
    """
    check(rounding=rounding)
    if total <= places or rounding == "exact":
        return min(total, places)
    ratio = 1 - places / total
    return groups * int((1 - ratio) * (total // groups))


def shares(sizes: Sequence[int], budget: int) -> list[int]:
    """The part of a budget that each group gets, in proportion to its size, by Webster's method.

    One by one, the next place goes to the group with the smallest (share + 1/2) / size, ties to
    the earlier. All but the last few places are given at once: no group ends with fewer.
    """
    assured = max(0, budget - len(sizes))
    given = [assured * size // sum(sizes) for size in sizes]
    for _ in range(budget - sum(given)):
        turns = [(2 * share + 1) / size for share, size in zip(given, sizes, strict=True)]
        given[turns.index(min(turns))] += 1
    return given
