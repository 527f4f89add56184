"""Where the time of a run goes: every second is counted once, over all starts."""

import json
import re

import pytest
from etils import epath

from fluxvit_jax.training import goodput
from fluxvit_jax.training.goodput import FILE, Goodput


@pytest.fixture
def clock(monkeypatch):
    """The time, which `clock.append` sets."""
    times = [0.0]
    monkeypatch.setattr(goodput.time, "monotonic", lambda: times[-1])
    return times


def seconds(folder) -> dict[str, float]:
    spent = json.loads((folder / FILE).read_text())["seconds"]
    return {name: value for name, value in spent.items() if value}


def spend(run: Goodput, clock: list[float], **amounts: float) -> None:
    for what, amount in amounts.items():
        run.enter(what)
        clock.append(clock[-1] + amount)


def test_every_second_is_counted_once(clock, tmp_path):
    run = Goodput(epath.Path(tmp_path))
    clock.append(3.0)  # since the start
    spend(run, clock, compile=20, data_wait=2, step=70, evaluation=4.5, checkpoint=0.5)
    run.write()
    spent = {"start": 3, "compile": 20, "data_wait": 2, "step": 70}
    assert seconds(tmp_path) == spent | {"evaluation": 4.5, "checkpoint": 0.5}
    assert run.describe() == (
        "goodput 70% of 100 s; compile 20%, evaluation 4%, start 3%, data wait 2%"
    )


def test_waiting_is_that_of_this_start(clock, tmp_path):
    earlier = Goodput(epath.Path(tmp_path))
    spend(earlier, clock, compile=9, data_wait=30, step=10)
    assert earlier.waiting == (40.0, 0.75)
    earlier.saved(7)
    run = Goodput(epath.Path(tmp_path))
    run.resume(7)
    spend(run, clock, compile=9, data_wait=1, step=4)
    assert run.waiting == (5.0, 0.2)


def test_what_a_kill_has_cost_is_lost(clock, tmp_path):
    killed = Goodput(epath.Path(tmp_path))
    spend(killed, clock, step=10, checkpoint=1)
    killed.saved(100)
    spend(killed, clock, step=7, data_wait=2)
    killed.write()

    resumed = Goodput(epath.Path(tmp_path))
    spend(resumed, clock, compile=5)
    resumed.resume(100)
    spend(resumed, clock, step=8)
    resumed.write()
    assert seconds(tmp_path) == {"compile": 5, "step": 18, "checkpoint": 1, "lost": 9}

    begun_anew = Goodput(epath.Path(tmp_path))  # the checkpoint was never finished
    begun_anew.resume(0)
    begun_anew.write()
    assert seconds(tmp_path) == {"lost": 33}


def test_a_checkpoint_without_times_keeps_those_of_the_one_before(clock, tmp_path):
    """As when the disk was full just after it was written."""
    killed = Goodput(epath.Path(tmp_path))
    for step in (100, 200):
        spend(killed, clock, step=10)
        killed.saved(step)

    resumed = Goodput(epath.Path(tmp_path))
    resumed.resume(150)
    resumed.write()
    assert seconds(tmp_path) == {"step": 10, "lost": 10}


@pytest.mark.parametrize("step", [40, 100, 190])
def test_going_on_from_an_old_checkpoint_loses_about_what_came_after(step, clock, tmp_path):
    """The best one may be far behind those that are damaged."""
    killed = Goodput(epath.Path(tmp_path))
    for number in range(1, 201):
        spend(killed, clock, step=10)
        killed.saved(number)

    resumed = Goodput(epath.Path(tmp_path))
    resumed.resume(step)
    resumed.write()
    spent = seconds(tmp_path)
    assert spent["step"] + spent["lost"] == 2000 and 0.7 * step <= spent["step"] / 10 <= step
    assert len(json.loads((tmp_path / FILE).read_text())["at_checkpoints"]) <= goodput.KEPT_SAVES


@pytest.mark.parametrize("old, new", [("}", ""), ('"4"', '"t"')], ids=["cut off", "no step"])
def test_a_damaged_file_is_begun_anew(clock, tmp_path, old, new):
    Goodput(epath.Path(tmp_path)).saved(4)
    path = tmp_path / FILE
    path.write_text(path.read_text().replace(old, new))
    run = Goodput(epath.Path(tmp_path))
    run.resume(4)
    spend(run, clock, step=1)
    run.write()
    assert seconds(tmp_path) == {"step": 1}


def test_a_run_tells_where_its_time_went(finished):
    spent = seconds(finished.workdir)
    assert set(spent) == {"start", "compile", "data_wait", "step", "evaluation", "checkpoint"}
    (told,) = re.findall(r"^goodput \d+% of (\d+) s; ", finished.log, re.MULTILINE)
    assert int(told) == round(sum(spent.values()))
