"""Cycles of kernels from the compiler's bundles."""

import os
import sys
from pathlib import Path

from fluxvit_jax.preflight.compiler import bundles
from fluxvit_jax.preflight.compiler.bundles import Count
from tests import limited

# A Pallas kernel on a grid of 10, in it a loop of 5 trips around one of 16, then one of 7, as
# libtpu 0.0.42 wrote it for v5e; of its bundles only those that tell of loops have their content.
KERNEL = (Path(__file__).parent / "v5e_kernel-final_bundles.txt").read_text()
OUTSIDE, GRID, OUTER, BODY = 21, 49, 3, 74  # bundles by depth: counted by hand


def whole(cycles: int) -> Count:
    return Count(cycles, complete=True)


def test_loops_are_counted_with_their_trips():
    assert bundles.count(KERNEL, 1) == whole(
        OUTSIDE + 10 * (GRID + 5 * (OUTER + 16 * BODY) + 7 * BODY)
    )


def test_a_loop_may_start_elsewhere():
    later = KERNEL.replace("%s1005_s27 = smov 0", "%s1005_s27 = smov 2")
    assert later != KERNEL
    inside = GRID + 3 * (OUTER + 16 * BODY) + 7 * BODY
    assert bundles.count(later, 1) == whole(OUTSIDE + 10 * inside)


def test_matrix_units_take_their_time():
    """Two units have 64 bundles' worth of 16 rows in the innermost loop, one has 8 rows more."""
    rows = 64 * 16 + 8
    products = [f"%{n}_v{n} = vmatmul.msk.bf16.gmra.mxu{n % 2} %v1_v1" for n in range(128)]
    products.append("%129_v0 = vmatmul.f32.vlgmr.msra.gmra.mxu1 %v1_v1")
    head = next(line for line in KERNEL.splitlines() if ">>> {" in line and "LB" not in line)
    busy = KERNEL.replace(head, head.rstrip("}") + " ;; ".join(["", *products]) + " }", 1)
    inside = OUTER + 16 * rows
    assert bundles.count(busy, 1) == whole(OUTSIDE + 10 * (GRID + 5 * inside + 7 * BODY))
    inside = OUTER + 16 * (rows // 2)
    assert bundles.count(busy, 2) == whole(OUTSIDE + 10 * (GRID + 5 * inside + 7 * BODY))
    assert bundles.count(busy, 100) == bundles.count(KERNEL, 1)


def test_a_loop_of_unknown_length_counts_once_and_is_told():
    unknown = KERNEL.replace("%s150_s28, 16 ", "%s150_s28, %s1_s1 ")
    inside = GRID + 5 * (OUTER + BODY) + 7 * BODY
    assert bundles.count(unknown, 1) == Count(OUTSIDE + 10 * inside, complete=False)
    unknown = KERNEL.replace("%s930_s12, 12 ", "%s930_s12, %s1_s1 ")
    inside = GRID + 5 * (OUTER + 16 * BODY) + 7 * BODY
    assert bundles.count(unknown, 1) == Count(OUTSIDE + inside, complete=False)


def test_what_was_written_is_found_by_name_and_removed():
    stem = bundles.folder() / "1795634224690787366"
    Path(f"{stem}-my-kernel.1-01-final_bundles.txt").write_text(KERNEL)
    Path(f"{stem}-my-kernel.1-00-schedule-analysis_final_bundles.txt").write_text("no bundles")
    assert bundles.read(["my-kernel.1", "other"], 1) == {"my-kernel.1": bundles.count(KERNEL, 1)}
    bundles.clear()
    assert bundles.read(["my-kernel.1"], 1) == {}


def test_what_killed_processes_left_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(bundles.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(bundles.tempfile, "tempdir", str(tmp_path))
    process = limited.Process([sys.executable, "-c", ""])
    process.wait()
    left, other = (tmp_path / f"{bundles.PREFIX}{n}-x" for n in (process.pid, os.getpid()))
    for folder in (left, other):
        folder.mkdir()
        (folder / "file").write_text("content")
    own = bundles.folder.__wrapped__()
    assert own.parent == tmp_path and own.is_dir()
    assert not left.exists() and other.exists()
