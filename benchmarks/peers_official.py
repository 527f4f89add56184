"""The paper's own code as a side of `benchmarks.peers`: `single_modality` of a checkout of FluxViT.

What its network imports and a CPU cannot have, flash-attn, is replaced by nothing, since its plain
attention is asked for; so are the four small functions that it takes from timm. Its GELU is set to
the one that the released weights were trained with, its position tables stay on the CPU where it
would move them to a GPU, patches with the same score are kept in their order, as ours are, and a
single clip works.
"""

import contextlib
import importlib
import io
import json
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.gpu_case import Case, Side
from benchmarks.gpu_torch import side_of
from fluxvit_jax.convert.torch_fluxvit import as_input

FLASH = ("flash_attn_interface", "bert_padding", "modules.mlp", "ops.rms_norm")


def side(case: Case) -> Side:
    return side_of(load(Path(case.checkout), Path(case.weights)), case)


def load(checkout: Path, weights: Path) -> nn.Module:
    """The official network with the weights of a folder, to be called as `torch_fluxvit`'s is."""
    replace_imports()
    sys.path.insert(0, str(checkout / "single_modality"))
    network = importlib.import_module("models.fluxvit").FluxViT
    torch.Tensor.cuda = lambda tensor: tensor  # type: ignore[method-assign]
    argsort = torch.argsort
    torch.argsort = lambda *args, **options: argsort(*args, **options, stable=True)

    class Official(network):  # type: ignore[misc, valid-type]
        def forward(self, video: Tensor, tokens: int, head: int) -> tuple[Tensor, Tensor]:
            frames = as_input(video)
            total = frames[0, ..., 0].numel() // 14**2
            ratio = 1 - (tokens + 0.5) / total  # what it truncates is the budget, whatever rounds
            return super().forward(
                frames.permute(0, 4, 1, 2, 3),
                masking_ratio=ratio,
                output_head=head,
                return_cls=True,
            )

        def project(self, pooled: Tensor, projector: int) -> Tensor:
            return self.final_clip_decoder_for_projs[projector](pooled)

    config = json.loads((weights / "config.json").read_text())
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its settings
        own = Official(
            embed_dim=config["width"],
            depth=config["depth"],
            num_heads=config["heads"],
            num_frames=config["frames"],
            img_size=14 * config["rows"],
            num_classes=config["classes"],
            attn_pool_num_heads=config["pool_heads"],
            clip_embed_dim=config["pool_width"],
            drop_path_rate=0.0,
            use_flash_attn=False,
            use_fused_rmsnorm=False,
            use_fused_mlp=False,
            use_gpe_proj=True,
            use_lpe=True,
            dual_norm_in_patch_embed=True,
        )
    own.load_state_dict(load_file(weights / "model.safetensors"))
    for block in own.blocks:
        block.mlp.act = nn.GELU("tanh")
        block.attn.lpe.register_forward_hook(lambda *given: OneClip(given[-1]))
    return own.eval()


class OneClip(NamedTuple):
    """[B, C, 1, N, 1], of which `squeeze` leaves B also where it is 1: there, the network fails."""

    tensor: Tensor

    def squeeze(self) -> Tensor:
        return self.tensor.squeeze((2, 4))


def replace_imports() -> None:
    """Modules in place of timm and flash-attn."""

    def module(name: str, **content: Any) -> None:
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(content)

    functions = ("flash_attn_varlen_qkvpacked_func", "unpad_input", "pad_input")
    absent = dict.fromkeys((*functions, "FusedMLP", "DropoutAddRMSNorm"), nn.Identity)
    for name in ("timm", "timm.models", "flash_attn", "flash_attn.modules", "flash_attn.ops"):
        module(name)
    for name in FLASH:
        module(f"flash_attn.{name}", **absent)
    module(
        "timm.models.layers",
        DropPath=nn.Identity,
        to_2tuple=lambda x: x if isinstance(x, tuple) else (x, x),
        trunc_normal_=nn.init.trunc_normal_,
    )
    module("timm.models.registry", register_model=lambda function: function)
