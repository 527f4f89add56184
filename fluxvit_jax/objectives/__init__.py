"""Training objectives, one file each; `base` has their interface and the registry."""
