"""Exchanges between devices: kinds, bytes, groups, and what hides them."""

import dataclasses

import pytest

from fluxvit_jax.preflight.compiler import hlo
from fluxvit_jax.preflight.compiler.collectives import first_group
from fluxvit_jax.preflight.compiler.hlo import Instruction
from fluxvit_jax.preflight.compiler.work import work_of


def cycles(count: int) -> str:
    return f'backend_config={{"window_config":{{"estimated_cycles":"{count}"}}}}'


# As the TPU compiler writes them: one in two instructions, one in fusions that also do other work,
# an all-reduce of which each device keeps a part.
TEXT = f"""HloModule exchanges

%start (p: f32[4,16]) -> (f32[4,16], f32[16,16]) {{
  %p = f32[4,16] parameter(0)
  %gather.1 = f32[16,16] all-gather(%p), channel_id=7, replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}
  ROOT %c.1 = (f32[4,16], f32[16,16]) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}}

%async_collective_fusion.2 (p.2: f32[4,16]) -> f32[16,16] {{
  %p.2 = f32[4,16] parameter(0)
  ROOT %gather.2 = f32[16,16] all-gather(%p.2), channel_id=7, replica_groups={{{{0,1,2,3}}}}
}}

%done (p.3: f32[4,16]) -> f32[16,16] {{
  %p.3 = f32[4,16] parameter(0)
  %gather.3 = f32[16,16] all-gather(%p.3), channel_id=7, replica_groups={{{{0,1,2,3}}}}
  ROOT %c.3 = f32[16,16] custom-call(%gather.3), custom_call_target="AsyncCollectiveDone"
}}

%scatter (p.4: f32[16,16]) -> f32[4,16] {{
  %p.4 = f32[16,16] parameter(0)
  %reduce.4 = f32[16,16] all-reduce(%p.4), channel_id=8, replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %slice.4 = f32[4,16] dynamic-slice(%reduce.4), dynamic_slice_sizes={{4,16}}
}}

ENTRY %main (x: f32[4,16]) -> f32[4,16] {{
  %x = f32[4,16] parameter(0)
  %begin = (f32[4,16], f32[16,16]) fusion(%x), kind=kCustom, calls=%start
  %permute-start = (f32[4,16], f32[4,16], u32[], u32[]) collective-permute-start(%x), source_target_pairs={{{{0,1}},{{1,2}},{{2,3}},{{3,0}}}}
  %work.1 = f32[4,16] sine(%x), {cycles(100)}
  %permute-done = f32[4,16] collective-permute-done(%permute-start)
  %work.2 = f32[16,16] fusion(%begin), kind=kOutput, calls=%async_collective_fusion.2, {cycles(30)}
  %end = f32[16,16] fusion(%begin), kind=kCustom, calls=%done
  %work.3 = f32[4,16] sine(%x), {cycles(1000)}
  ROOT %kept = f32[4,16] fusion(%end), kind=kCustom, calls=%scatter
}}
"""  # noqa: E501


def test_each_counts_once_and_knows_what_hides_it():
    gather, permute, scatter = work_of(hlo.parse(TEXT), 4).collectives
    everybody = (0, 1, 2, 3)
    assert dataclasses.astuple(gather) == ("all-gather", 16 * 16 * 4, everybody, 1, 130)
    assert dataclasses.astuple(permute) == ("collective-permute", 4 * 16 * 4, (0, 1), 1, 100)
    assert dataclasses.astuple(scatter) == ("reduce-scatter", 16 * 16 * 4, everybody, 1, 0)


def test_they_are_no_instructions_that_the_estimate_forgets():
    assert work_of(hlo.parse(TEXT), 4).untimed == {}


@pytest.mark.parametrize(
    ("written", "group"),
    [
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups={}", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, q", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, q", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}, q", (0, 1, 4, 5)),
        ("source_target_pairs={{3,5},{5,3}}", (3, 5)),
    ],
)
def test_groups_however_they_are_written(written, group):
    instruction = Instruction(
        name="x",
        root=False,
        result="",
        opcode="all-reduce",
        operands=(),
        arguments="",
        attributes=written,
    )
    assert first_group(instruction, 8) == group
