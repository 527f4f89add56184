"""The Python in README runs as it is printed there."""

import re
from pathlib import Path

import numpy as np
import pytest

from fluxvit_jax.export import run
from tests.test_pretrained import photograph

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_examples():
    assert len(EXAMPLES) == 2


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example(number, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(str(finished.workdir), "exported") == 0
    names = {"checkpoint": finished.workdir, "video": photograph(6, 42, 42)}
    exec(EXAMPLES[number], names)
    assert names["out"].logits.shape == (1, 4)
    if "kept" in names:
        assert names["kept"].sum() == names["out"].tokens_kept == 16
        assert (tmp_path / "converted" / "torch_fluxvit.py").exists()
    else:
        assert np.asarray(names["out"].kept).sum() == names["model"].budgets[-1]
