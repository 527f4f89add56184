"""Reading the text of compiled programs."""

from pathlib import Path

import pytest

from fluxvit_jax.preflight.compiler import hlo
from fluxvit_jax.preflight.compiler.hlo import Array
from fluxvit_jax.preflight.compiler.work import work_of

# Two products of [2, 512, 256] with [256, 256] on each of 16 v5e, scanned over three layers, with
# gradients and an update: what libtpu 0.0.42 made of it, without layouts and most of its notes.
SAMPLE = (Path(__file__).parent / "v5e_scan.hlo").read_text()
PRODUCT = 2 * (2 * 512) * 256 * 256

LOOP = """HloModule loop

%condition (state: (s32[], f32[8])) -> pred[] {
  %state = (s32[], f32[8]) parameter(0)
  %bound = s32[] constant(17)
  %counter = s32[] get-tuple-element(%state), index=0
  ROOT %again = pred[] compare(%counter, %bound), direction=LT
}

%body (state.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state.1 = (s32[], f32[8]) parameter(0)
  %counter.1 = s32[] get-tuple-element(%state.1), index=0
  %step = s32[] constant(4)
  %next = s32[] add(%counter.1, %step)
  %x = f32[8]{0} get-tuple-element(%state.1), index=1
  %sin = f32[8]{0} sine(%x), backend_config={"window_config":{"estimated_cycles":"10"}}
  ROOT %new = (s32[], f32[8]) tuple(%next, %sin)
}

ENTRY %main (x.1: f32[8]) -> f32[8] {
  %first = s32[] constant(1)
  %copy = s32[] copy(%first)
  %x.1 = f32[8]{0} parameter(0)
  %tuple = (s32[], /*index=1*/f32[8]{0}) tuple(%copy, %x.1)
  %while = (s32[], f32[8]{0:T(128)}) while(%tuple), condition=%condition, body=%body
  ROOT %result = f32[8]{0} get-tuple-element(%while), index=1, metadata={op_name="a(b)"}
}
"""


def sine_times(text: str) -> int:
    return next(s.times for s in hlo.executed(hlo.parse(text)) if s.instruction.opcode == "sine")


def test_instructions():
    module = hlo.parse(LOOP)
    assert module.entry == "main" and set(module.computations) == {"condition", "body", "main"}
    loop, result = module.computations["main"][-2:]
    assert loop.opcode == "while" and loop.operands == ("tuple",) and not loop.root
    assert loop.arrays == [Array("s32", ()), Array("f32", (8,))]
    assert loop.arrays[1].bytes == 32
    assert result.root and result.op_name == "a(b)" and result.cycles is None
    assert module.instructions("body")["sin"].cycles == 10


@pytest.mark.parametrize(
    ("change", "trips"),
    [
        (("", ""), 4),  # 1, 5, 9, 13
        (("LT", "LE"), 5),  # 17 as well
        (("constant(17)", "constant(0)"), 0),
        (("(%counter, %bound), direction=LT", "(%bound, %counter), direction=GT"), 4),
        (("%step = s32[] constant(4)", "%step = s32[] parameter(1)"), 16),  # unknown: 1
        (("%first = s32[] constant(1)", "%first = s32[] parameter(1)"), 5),  # unknown: 0
        (("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}'), 7),
    ],
)
def test_trips_of_a_loop(change, trips):
    assert sine_times(LOOP.replace(*change)) == trips


def test_a_loop_without_end_in_sight_counts_once_and_is_told():
    text = LOOP.replace("%bound = s32[] constant(17)", "%bound = s32[] parameter(1)")
    work = work_of(hlo.parse(text), 1)
    assert work.unknown_loops == 1 and work.cycles == 10
    assert work_of(hlo.parse(LOOP), 1).unknown_loops == 0


def test_the_bound_may_be_compared_in_a_fusion():
    text = LOOP.replace(
        "ROOT %again = pred[] compare(%counter, %bound), direction=LT",
        "ROOT %again = pred[] fusion(%bound, %counter), kind=kLoop, calls=%compare",
    ).replace(
        "%body (state.1",
        "%compare (a: s32[], b: s32[]) -> pred[] {\n"
        "  %a = s32[] parameter(0)\n"
        "  %b = s32[] parameter(1)\n"
        "  ROOT %c = pred[] compare(%b, %a), direction=LT\n}\n\n%body (state.1",
    )
    assert sine_times(text) == 4


def test_texts_within_attributes_may_have_line_breaks():
    text = LOOP.replace('metadata={op_name="a(b)"}', 'frontend_attributes={x={\n"y":"{}"\n}}, q=1')
    assert hlo.parse(text).computations["main"][-1].attribute(r"q=(\d)") == "1"


def test_a_text_that_is_no_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule empty\n")


def test_a_program_of_the_tpu_compiler():
    work = work_of(hlo.parse(SAMPLE), 16)
    # Forward, to the kernels and to the inputs, in each of three trips; the first layer's inputs
    # are among the latter, as the loop does not know which is the first.
    assert work.flops == 3 * 3 * PRODUCT
    assert work.cycles == sum(
        s.times * s.instruction.cycles
        for s in hlo.executed(hlo.parse(SAMPLE))
        if s.instruction.cycles and not s.fused
    )
    assert not work.kernels and not work.untimed and not work.unknown_loops
    kernel, loss = work.collectives
    assert (kernel.kind, kernel.bytes, kernel.times) == ("all-reduce", 256 * 256 * 2, 3)
    assert (loss.kind, loss.bytes, loss.times) == ("all-reduce", 4, 1)
    assert kernel.group == loss.group == tuple(range(16))
