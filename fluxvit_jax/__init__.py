"""FluxViT in JAX: a video transformer that is trained once and runs at any token budget.

model = fluxvit_jax.from_pretrained(PATH)     # a workdir, a folder, .safetensors, .pth
out = model(video, tokens=1024)               # out.logits, out.pooled, out.tokens_kept
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fluxvit_jax.pretrained import from_pretrained

__all__ = ["from_pretrained"]


def __getattr__(name: str) -> Any:
    """Imports late: data workers import this package and do without JAX."""
    if name == "from_pretrained":
        from fluxvit_jax.pretrained import from_pretrained

        return from_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
