"""What servers run, as sides of `benchmarks.peers`: our export, and one for ONNX Runtime."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.gpu_case import Case, Side, clips_of, dtype_on
from fluxvit_jax.grids import PATCH


def ours_side(case: Case) -> Side:
    """`--mode=export` of the weights, read by `load_exported`."""
    import jax

    from fluxvit_jax import from_pretrained, load_exported
    from fluxvit_jax.deploy.export import export

    T, H, _ = case.grid
    folder = Path(case.weights) / "export"
    live = from_pretrained(case.weights, dtype=dtype_on(case, "cpu"))
    export(live, folder, [(budget, T, PATCH * H) for budget in case.budgets])
    model = load_exported(folder)
    video, _ = clips_of(case, live.config.model.classes)

    def program(budget: int) -> Callable[[], dict[str, jax.Array]]:
        def run() -> dict[str, jax.Array]:
            return {"probabilities": jax.nn.softmax(model(video, budget).logits)}

        return run

    return Side(
        {"platform": "cpu", "jax": jax.__version__},
        {str(budget): program(budget) for budget in case.budgets},
        wait=jax.block_until_ready,
        fetch=np.asarray,
        peak=lambda _: None,
    )


def onnx_side(case: Case) -> Side:
    """ONNX Runtime with a program of `torch_fluxvit.py` for each budget."""
    import onnxruntime
    import torch

    from fluxvit_jax.convert.torch_fluxvit import FluxViT

    model = FluxViT.from_folder(case.weights)
    video, _ = clips_of(case, model.head[0].out_features)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    sessions = {}
    for head, budget in enumerate(case.budgets):
        path = Path(case.weights) / f"{budget}.onnx"
        given = {"tokens": budget, "head": head}
        pixels = (torch.from_numpy(video),)
        torch.onnx.export(model, pixels, path, kwargs=given, dynamo=True, verbose=False)
        sessions[str(budget)] = onnxruntime.InferenceSession(path, options)

    def program(session: onnxruntime.InferenceSession) -> Callable[[], dict[str, np.ndarray]]:
        def run() -> dict[str, np.ndarray]:
            logits, _ = session.run(None, {"video": video})
            exponents = np.exp(logits - logits.max(-1, keepdims=True))
            return {"probabilities": exponents / exponents.sum(-1, keepdims=True)}

        return run

    return Side(
        {"platform": "cpu", "onnxruntime": onnxruntime.__version__},
        {name: program(session) for name, session in sessions.items()},
        wait=lambda _: None,
        fetch=lambda array: array,
        peak=lambda _: None,
    )
