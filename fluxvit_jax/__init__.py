"""FluxViT in JAX: a video transformer that is trained once and runs at any token budget."""
