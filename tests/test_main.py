"""The command line: what it prints, its exit status, one line for each mistake."""

import fnmatch
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.numpy

from fluxvit_jax import command_line, main
from fluxvit_jax.checkpoints.checkpointer import restore_params
from fluxvit_jax.config.fields import FIELDS
from fluxvit_jax.config.loading import flag_argument, load_config
from fluxvit_jax.convert import official_names
from fluxvit_jax.data import places
from fluxvit_jax.errors import UserError
from fluxvit_jax.training.completeness import check_complete
from tests import limited, programs, tiny


def outcome(process) -> tuple[int, str, str]:
    out, err = process.communicate()
    return process.returncode, out, err


def outcome_here(capsys, folder, workdir, *options: str) -> tuple[int, str, str]:
    """Of the program on the tiny recipe, in this process."""
    recipe = [f"--config={tiny.__file__}:{folder}", f"--workdir={workdir}"]
    status = programs.run_module("fluxvit_jax.main", *recipe, *options)
    return status, *capsys.readouterr()


def error_line(err: str) -> str:
    """The one line that says what is wrong; there is no traceback."""
    assert "Traceback" not in err, err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and err.splitlines()[-1] == lines[0], err
    return lines[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config.train.epoch=3"], r"config.train.epoch: no such field; did you mean .*epochs"),
        (["--config.train.epochs=many"], r"config.train.epochs: 'many' is not a whole number"),
        (["--config.train.budgets=(500,)"], r"no grid can fill 500 tokens, .* has 99"),
        (["--config.data.train=/nowhere.csv"], r"/nowhere.csv: no such file"),
        (["--mode=dance"], r"mode.*train|evaluate"),
        (["--workdir="], r"no folder for the run given"),
    ],
)
def test_mistakes_are_one_line(tiny_data, compiled, tmp_path, capsys, options, message):
    workdir = tmp_path / "run"
    status, out, err = outcome_here(capsys, tiny_data, workdir, *options)
    assert status == 2 and re.search(message, error_line(err)), err
    assert not out and not workdir.exists()


@pytest.mark.parametrize("mode", ["train", "evaluate"])
def test_a_run_needs_a_recipe(tmp_path, mode):
    command = [sys.executable, "-m", "fluxvit_jax.main", f"--mode={mode}", f"--workdir={tmp_path}"]
    done = limited.run(command, cwd=tiny.ROOT)
    assert done.returncode == 2 and "no recipe given" in error_line(done.stderr)


def program(*options: str) -> str:
    """What the program prints, which ends well and without a word on stderr."""
    command = [sys.executable, "-m", "fluxvit_jax.main", *options]
    done = limited.run(command, cwd=tiny.ROOT)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


def test_help_tells_of_every_flag_and_field():
    text = program("--help")
    for name in ("config", "mode", "workdir", "debug", "hosts", "tokens", "video", "milliseconds"):
        assert f"  --{name}: " in text, name
    assert "verbosity" not in text  # a flag of absl's
    for mode in command_line.MODES:
        assert f"\n  {mode} " in text
    words = " ".join(text.split())
    for name, field in FIELDS.items():
        assert re.search(rf"--config\.{re.escape(name)}=\S.*?: {re.escape(field.help)}", words), (
            name
        )


def test_help_that_a_pager_cuts_short():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "fluxvit_jax.main", "--help"]
    done = limited.run(command, cwd=tiny.ROOT, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.returncode == -signal.SIGPIPE and done.stderr == ""


def test_help_leaves_the_process_as_it_was():
    """One that calls `main` would otherwise die, silently, of the next connection that closes."""
    before = signal.getsignal(signal.SIGPIPE)
    assert programs.run_module("fluxvit_jax.main", "--help") == 0
    assert signal.getsignal(signal.SIGPIPE) is before


def test_help_of_one_mode_with_the_values_of_a_recipe():
    text = program("--mode=predict", "--config=demo", "-h")
    assert "  --video: " in text and "--config.eval.clips=2:" in text
    assert "\n  export " not in text and "--accept_data_change" not in text
    assert "--config.train." not in text


def test_print_config():
    printed = json.loads(
        program("--config=demo:single", "--config.train.epochs=3", "--print_config")
    )
    config = load_config("configs/demo.py:single", ["--config.train.epochs=3"])
    assert printed == json.loads(json.dumps(config.to_dict()))


def test_all_that_is_missing_is_told_at_once(tmp_path, monkeypatch):
    """And the command that it ends with lacks nothing once the files are there."""
    monkeypatch.chdir(tmp_path)
    recipe = "k400:base"
    argv = ["main", f"--config={recipe}", "--config.data.root=videos"]
    with pytest.raises(UserError) as caught:
        check_complete(load_config(recipe, argv[2:]), recipe, "run", argv)
    message = str(caught.value)
    for words in ("data/k400", "videos to train on", "to validate on", "weights to start from"):
        assert words in message
    assert "videos: no such file or folder (config.data.root)" in message
    (command,) = re.findall(r"python -m fluxvit_jax\.main (.*)", message)
    options = shlex.split(command)
    for option in options[1:]:
        Path(option.partition("=")[2]).touch()
    argv = ["main", *options]
    check_complete(load_config(recipe, options[1:]), recipe, "run", argv)


def test_a_single_path_that_is_wrong_is_left_to_those_who_open_it(tiny_data, tmp_path):
    config = tiny.make_config(tiny_data, data__train="/nowhere.csv")
    check_complete(config, "tests/tiny.py", tmp_path, ["main"])
    config = tiny.make_config(tiny_data, data__train="")
    with pytest.raises(UserError, match=r"--config\.data\.train=TRAIN\.csv"):
        check_complete(config, "tests/tiny.py", tmp_path, ["main"])


def test_a_run_that_goes_on_needs_no_weights_to_start_from(tiny_data, tmp_path):
    config = tiny.make_config(tiny_data, train__init_from="REQUIRED")
    with pytest.raises(UserError, match="weights to start from"):
        check_complete(config, "tests/tiny.py", tmp_path, ["main"])
    (tmp_path / "checkpoints").mkdir()
    check_complete(config, "tests/tiny.py", tmp_path, ["main"])


@pytest.mark.parametrize("folder", ["data", "elsewhere"])
def test_data_in_their_default_place(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    if folder == "elsewhere":
        monkeypatch.setenv(places.VARIABLE, folder)
    (tmp_path / folder / "k400" / "val").mkdir(parents=True)
    (tmp_path / folder / "k400" / "train.csv").touch()
    for recipe in ("k400:base", "finetune:k400,base"):
        config = load_config(recipe)
        assert config.data.train == f"{folder}/k400/train.csv"
        assert config.data.validation == f"{folder}/k400/val"
    assert load_config("ssv2").data.train == ""


@pytest.mark.parametrize(
    ("recipe", "workdir"),
    [
        ("configs/k400.py:base", "runs/k400-base"),
        ("k400", "runs/k400"),
        ("configs/finetune.py:k400,single=2048", "runs/k400-single-2048"),
        (
            "configs/pretrain.py:base,data=lists/mixture.csv",
            "runs/pretrain-base-data-lists-mixture.csv",
        ),
    ],
)
def test_the_default_workdir(recipe, workdir):
    assert places.workdir_of(recipe) == workdir


def test_a_workdir_alone_brings_its_config(finished, tiny_data):
    override = "--config.eval.clips=1"
    argv = ["main", "--mode=evaluate", f"--workdir={finished.workdir}", override]
    recipe = flag_argument(command_line.resolved(argv), "config")
    config = load_config(recipe, [override])
    assert config.to_dict() == tiny.make_config(tiny_data, eval__clips=1).to_dict()
    assert command_line.resolved(["main", "--mode=predict", argv[2]]) == [
        "main",
        "--mode=predict",
        argv[2],
    ]


def test_debug_shows_where(tiny_data, compiled, tmp_path):
    status, _, err = outcome(
        tiny.start(tiny_data, tmp_path, compiled, "--debug", "--config.data.train=/nowhere.csv")
    )
    assert status != 0 and "Traceback" in err and "annotations.py" in err


def test_a_workdir_of_another_config(finished, tiny_data, capsys):
    status, _, err = outcome_here(capsys, tiny_data, finished.workdir, "--config.optim.b2=0.9")
    assert status == 2 and "(optim.b2: 0.999 -> 0.9)" in error_line(err)


def test_damaged_checkpoints(finished, tiny_data, compiled, tmp_path, capsys):
    """The best is passed over with a warning; none left is an error."""
    workdir = shutil.copytree(finished.workdir, tmp_path / "run")
    steps = sorted(p for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    for step in steps:
        damage(step)
    for mode in ("train", "evaluate"):
        status, _, err = outcome_here(capsys, tiny_data, workdir, f"--mode={mode}")
        assert status == 2 and re.search(r"intact|damaged", error_line(err))
    assert sorted(p for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()) == steps


def damage(step: Path) -> None:
    """Flips one bit in the middle of the parameters."""
    file = max((step / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.slow
def test_weights_of_another_model(finished, tiny_data, compiled, tmp_path, capsys):
    params = restore_params(finished.workdir)
    path = tmp_path / "model.safetensors"
    state = official_names.to_official(params)
    del state["gpe_proj.depthwise_conv.bias"]
    safetensors.numpy.save_file(state, path)
    runs = {
        f"{path}": r"gpe_proj.depthwise_conv.bias",
        f"{finished.workdir}": r": width 64, depth 2 \(Ti\); the recipe is S: width 384, depth 12$",
    }
    for source, message in runs.items():
        options = [f"--config.train.init_from={source}"]
        options += ["--config.model.variant=S"] * (source != str(path))
        workdir = tmp_path / "run"
        status, _, err = outcome_here(capsys, tiny_data, workdir, *options)
        assert status == 2 and re.search(message, error_line(err)), err
        assert not (workdir / "config.json").exists()


@pytest.mark.parametrize(
    ("libtpu", "devices", "platforms"),
    [(True, [], "cpu"), (True, ["/dev/vfio/0"], None), (False, [], None)],
)
def test_no_noise_of_a_libtpu_without_a_tpu(monkeypatch, libtpu, devices, platforms):
    monkeypatch.setattr(main.importlib.util, "find_spec", lambda name: libtpu or None)
    monkeypatch.setattr(main.glob, "glob", lambda pattern: fnmatch.filter(devices, pattern))
    monkeypatch.setenv("JAX_PLATFORMS", "")  # so that it is as it was afterwards
    monkeypatch.delenv("JAX_PLATFORMS")
    main.avoid_libtpu()
    assert os.environ.get("JAX_PLATFORMS") == platforms


def test_evaluate_needs_a_workdir_only_and_prints_a_table(finished, compiled):
    command = ["--mode=evaluate", f"--workdir={finished.workdir}"]
    done = limited.run(
        [sys.executable, "-m", "fluxvit_jax.main", *command],
        env=tiny.environment(compiled),
    )
    assert done.returncode == 0, done.stderr
    assert "leaked" not in done.stderr and "Traceback" not in done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    # No top-5: there are four classes.
    assert rows[0] == ["budget", "frames", "resolution", "tokens", "head", "top-1", "ECE"]
    assert [row[0] for row in rows[1:3]] == ["24", "12"]


def catches(process: limited.Process, number: int) -> bool:
    """Whether a process has a handler of its own for a signal (Linux)."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (caught,) = re.findall(r"^SigCgt:\s*(\w+)", status, re.MULTILINE)
    return bool(int(caught, 16) >> number - 1 & 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_training_has_begun(tiny_data, compiled, tmp_path, number):
    process = tiny.start(tiny_data, tmp_path, compiled)
    # As the program does from its first line on.
    assert limited.wait_until(lambda: catches(process, signal.SIGTERM), process)
    time.sleep(0.5)  # while it imports
    process.send_signal(number)
    status, _, err = outcome(process)
    assert status == 128 + number and "Traceback" not in err
