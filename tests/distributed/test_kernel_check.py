"""Attention kernels that compute wrong or fail on a device are left out, and that is said."""

import re

import jax
import pytest

from fluxvit_jax.config.fields import default_config
from fluxvit_jax.config.network import choose_attention
from fluxvit_jax.config.variants import TEACHERS
from fluxvit_jax.distributed import kernel_check
from fluxvit_jax.errors import UserError
from fluxvit_jax.models import attention, attention_check, chunked_attention
from fluxvit_jax.objectives.base import objective_class


@pytest.fixture(autouse=True)
def none_refused(monkeypatch):
    monkeypatch.setattr(attention, "REFUSED", set())


def make_config(**changes):
    config = default_config("Ti")
    config.model.dtype = "float32"
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


def test_a_right_kernel_stays(capsys):
    kernel_check.prove_kernels(make_config(), {32, 64}, "cpu")
    assert not attention.REFUSED and capsys.readouterr().err == ""
    assert attention_check.difference("chunked", "float32", 32) < 1e-5


def test_a_wrong_gradient_is_found(monkeypatch, capsys):
    right = chunked_attention.backward

    def wrong(*arguments):
        gradients = right(*arguments)
        return gradients._replace(k=gradients.k * 1.01)

    monkeypatch.setattr(chunked_attention, "backward", wrong)
    kernel_check.prove_kernels(make_config(), {64}, "cpu")
    assert {("chunked", 64)} == attention.REFUSED
    assert choose_attention(make_config(), "cpu", 64) == "xla"
    assert choose_attention(make_config(), "cpu", 32) == "chunked"
    said = capsys.readouterr().err
    assert re.fullmatch(
        r"attention kernel chunked is off by 1e-02 of the largest number on .*\(cpu\): xla takes "
        r"its place\n",
        said,
    )


def test_a_kernel_that_fails_is_left_out(monkeypatch, capsys):
    def fail(*arguments):
        raise jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed to compile\nand much more")

    monkeypatch.setattr(chunked_attention, "forward", fail)
    kernel_check.prove_kernels(make_config(), {64}, "cpu")
    assert "chunked fails (INTERNAL: Mosaic failed to compile) on" in capsys.readouterr().err
    with pytest.raises(
        UserError, match=r"chunked fails .*; --config\.model\.attention=auto leaves"
    ):
        kernel_check.prove_kernels(make_config(model__attention="chunked"), {64}, "cpu")


def test_the_next_one_of_a_platform(monkeypatch):
    """On TPU: ours, JAX's, then XLA's."""
    assert attention.choose("auto", "tpu", "bfloat16", 64) == "pallas"
    attention.REFUSED.add(("pallas", 64))
    assert attention.choose("auto", "tpu", "bfloat16", 64) == "splash"
    attention.REFUSED.add(("splash", 64))
    assert attention.choose("auto", "tpu", "bfloat16", 64) == "xla"


def test_every_network_of_a_run_is_meant():
    config = make_config()
    assert objective_class(config).head_sizes(config) == {32}
    config.train.objective = "flux_umt"
    config.distill.network, config.distill.teacher = "InternVideo2-1B", "teacher"
    teacher = TEACHERS["InternVideo2-1B"]
    assert objective_class(config).head_sizes(config) == {32, teacher.width // teacher.heads}
