"""Recorders in place of every tool that the launch scripts call."""

import pytest

from tests.launch.recorder import Recorders

TOOLS = (
    "docker",
    "gcloud",
    "kubectl",
    "sbatch",
    "scontrol",
    "sleep",
    "squeue",
    "srun",
    "uv",
    "xpk",
)


@pytest.fixture
def recorders(tmp_path) -> Recorders:
    return Recorders(tmp_path / "bin", TOOLS)
