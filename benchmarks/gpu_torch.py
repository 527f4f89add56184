"""PyTorch's side of `benchmarks.gpu`: the network of `torch_fluxvit`, trained and asked."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from ml_collections import ConfigDict
from torch import Tensor, nn

from benchmarks.gpu_case import Case, Side, clips_of, dtype_on, make_config, training_name
from fluxvit_jax.convert.torch_fluxvit import FluxViT

Programs = dict[str, Callable[[], dict[str, Tensor]]]


def side(case: Case) -> Side:
    """The same in PyTorch, with the weights of `case.weights`; each first call compiles."""
    model = FluxViT.from_folder(case.weights)
    stream = getattr(torch, dtype_on(case, "gpu" if torch.cuda.is_available() else "cpu"))
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: (inputs[0].to(stream),))
    return side_of(model, case)


def side_of(model: nn.Module, case: Case) -> Side:
    """A side of any network that is called as `torch_fluxvit`'s is, and has its names."""
    cuda = torch.cuda.is_available()
    device, platform = ("cuda", "gpu") if cuda else ("cpu", "cpu")
    dtype = dtype_on(case, platform)
    if cuda:
        torch.set_float32_matmul_precision("high")
    model = model.to(device)
    make = training if case.task == "training" else inference
    autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")
    about = {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "platform": platform,
        "dtype": dtype,
        "torch": torch.__version__,
        "compiler": case.compiler or "none",
    }

    def peak(_: str) -> int | None:
        if not cuda:
            return None
        found = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return found

    return Side(
        about,
        make(model, case, autocast),
        wait=lambda _: torch.cuda.synchronize() if cuda else None,
        fetch=lambda x: x.float().cpu().numpy(),
        peak=peak,
    )


def training(model: nn.Module, case: Case, autocast: torch.autocast) -> Programs:
    """The step of `gpu_jax.training`, as one writes it in PyTorch."""
    video, labels = on_device(model, *clips_of(case, model.head[0].out_features))
    optimizer = adamw(model, make_config(case, "float32"))

    def one_pass(budget: int, head: int, anchor: Tensor | None) -> tuple:
        """One budget's loss, and the clip vectors of the largest, to which others are aligned."""
        logits, pooled = model(video, budget, head)
        loss = F.cross_entropy(logits, labels)
        if anchor is None:
            return loss, F.normalize(pooled.detach().float(), dim=-1)
        return loss + F.smooth_l1_loss(model.project(pooled, head - 1), anchor), anchor

    compiled = compile_by(case.compiler, one_pass)

    def run() -> dict[str, Tensor]:
        optimizer.zero_grad()
        total, anchor = 0.0, None
        for head, budget in enumerate(case.budgets):
            with autocast:
                loss, anchor = compiled(budget, head, anchor)
            loss.backward()  # adds to the gradients of the passes before
            total = total + loss.detach()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)  # the step logs it, so ours computes it
        optimizer.step()
        return {"loss": total, "gradient_norm": norm}

    return {training_name(case): run}


def adamw(model: nn.Module, config: ConfigDict) -> torch.optim.Optimizer:
    """The optimizer of the config: matrices and convolutions decay (see `training.optimizer`)."""
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[parameter.ndim > 1 and name not in ("cls_token", "pos_embed")].append(parameter)
    optim = config.optim
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": optim.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=optim.learning_rate,
        betas=(optim.b1, optim.b2),
        eps=optim.eps,
        fused=True,
    )


def inference(model: nn.Module, case: Case, autocast: torch.autocast) -> Programs:
    """The programs of `gpu_jax.inference`."""
    classes = model.head[0].out_features
    [video] = on_device(model, clips_of(case, classes)[0])
    [start] = on_device(model, np.zeros((case.batch, classes), np.float32))

    def add_view(total: Tensor, budget: int, head: int) -> Tensor:
        return total + model(video, budget, head)[0].float().softmax(-1)

    compiled = compile_by(case.compiler, add_view)

    def program(budget: int, head: int) -> Callable[[], dict[str, Tensor]]:
        def run() -> dict[str, Tensor]:
            with torch.no_grad(), autocast:
                return {"probabilities": compiled(start, budget, head)}

        return run

    return {str(budget): program(budget, head) for head, budget in enumerate(case.budgets)}


def compile_by(backend: str, function: Callable) -> Callable:
    """The function as one graph; as it is without a backend."""
    if not backend:
        return function
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)


def on_device(model: nn.Module, *arrays: np.ndarray) -> list[Tensor]:
    """Arrays where the model is; what was int32 becomes int64, as labels have to be."""
    device = next(model.parameters()).device
    tensors = (torch.from_numpy(array).to(device) for array in arrays)
    return [x.long() if x.dtype == torch.int32 else x for x in tensors]
