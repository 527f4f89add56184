"""FluxViT in JAX: a video transformer that is trained once and runs at any token budget.

model = fluxvit_jax.from_pretrained(PATH)     # a workdir, a folder, .safetensors, .pth
model.predict("a.mp4", tokens=512, top=5)     # names and probabilities
video = fluxvit_jax.read_video("a.mp4", frames=16)  # uint8 [16, height, width, 3]
out = model(video, tokens=1024)               # out.logits, out.pooled, out.tokens_kept
best = fluxvit_jax.plan(WORKDIR, milliseconds=8)  # best.budget, best.frames, best.resolution
best = fluxvit_jax.plan(WORKDIR, average_milliseconds=8)  # model.run_cascade("a.mp4", best.cascade)
chat = fluxvit_jax.load_chat(WORKDIR)  # chat.ask("a.mp4", "What happens?", tokens=512)
"""

from typing import TYPE_CHECKING, Any

from fluxvit_jax.version import __version__

if TYPE_CHECKING:
    from fluxvit_jax.adaptive.planner import plan
    from fluxvit_jax.data.clips import read_video
    from fluxvit_jax.deploy.chat import load_chat
    from fluxvit_jax.deploy.exported import load_exported
    from fluxvit_jax.deploy.pretrained import from_pretrained

__all__ = ["__version__", "from_pretrained", "load_chat", "load_exported", "plan", "read_video"]


def __getattr__(name: str) -> Any:
    """Lazy imports: data workers need no JAX, and a server nothing that only training needs."""
    if name == "from_pretrained":
        from fluxvit_jax.deploy.pretrained import from_pretrained

        return from_pretrained
    if name == "load_chat":
        from fluxvit_jax.deploy.chat import load_chat

        return load_chat
    if name == "load_exported":
        from fluxvit_jax.deploy.exported import load_exported

        return load_exported
    if name == "plan":
        from fluxvit_jax.adaptive.planner import plan

        return plan
    if name == "read_video":
        from fluxvit_jax.data.clips import read_video

        return read_video
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
