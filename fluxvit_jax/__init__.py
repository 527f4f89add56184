"""FluxViT in JAX: a video transformer that is trained once and runs at any token budget.

model = fluxvit_jax.from_pretrained(PATH)     # a workdir, a folder, .safetensors, .pth
out = model(video, tokens=1024)               # out.logits, out.pooled, out.tokens_kept
best = fluxvit_jax.plan(WORKDIR, milliseconds=8)  # best.budget, best.frames, best.resolution
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fluxvit_jax.exported import load_exported
    from fluxvit_jax.planner import plan
    from fluxvit_jax.pretrained import from_pretrained

__all__ = ["from_pretrained", "load_exported", "plan"]


def __getattr__(name: str) -> Any:
    """Imports late: data workers do without JAX, and a server without all that training needs."""
    if name == "from_pretrained":
        from fluxvit_jax.pretrained import from_pretrained

        return from_pretrained
    if name == "load_exported":
        from fluxvit_jax.exported import load_exported

        return load_exported
    if name == "plan":
        from fluxvit_jax.planner import plan

        return plan
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
