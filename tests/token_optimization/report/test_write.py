"""The files of a report, also of searches that are not done, or small."""

import json
import sys

import pytest

from fluxvit_jax.errors import UserError
from fluxvit_jax.token_optimization import report
from tests import limited
from tests.token_optimization.report.sample import (
    DEVICES,
    NASTY,
    csv_rows,
    percent,
    read,
    sample,
    words,
)


def test_four_files_and_no_other_are_written(tmp_path):
    folder = tmp_path / "run" / "search"
    for _ in range(2):  # the second time over those of the first
        report.write(sample(), folder)
        names = {"report.json", "report.csv", "report.html", "report.png"}
        assert {path.name for path in folder.iterdir()} == names


def test_json_is_the_report(tmp_path):
    given = sample(nasty=NASTY)
    report.write(given, tmp_path)
    text = (tmp_path / "report.json").read_text()
    assert json.loads(text) == given
    assert text == json.dumps(given, indent=1) + "\n"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "search").write_text("a file")
    with pytest.raises(UserError, match=r"search: cannot be written"):
        report.write(sample(), tmp_path / "search")


def test_nothing_unfinished_stays_where_a_file_cannot_be_replaced(tmp_path):
    (tmp_path / "report.csv").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        report.write(sample(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.csv"}


def test_importing_the_module_does_not_import_what_draws():
    code = (
        "import sys, fluxvit_jax.token_optimization.report as r; "
        "print('matplotlib' in sys.modules, r.write.__name__)"
    )
    done = limited.run([sys.executable, "-c", code])
    assert (done.returncode, done.stdout) == (0, "False write\n"), done.stderr


def test_the_same_report_is_the_same_page(given, folder, tmp_path):
    report.write(given, tmp_path)
    for name in ("report.html", "report.csv"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


OPTIONAL = (
    *(
        "checkpoint",
        "network",
        "dtype",
        "views",
        "budgets",
        "frames",
        "resolutions",
        "choose",
        "report",
    ),
    *("notes", "chosen", "skipped", "devices", "fingerprint", "version"),
)


@pytest.mark.parametrize("missing", [*((key,) for key in OPTIONAL), OPTIONAL])
@pytest.mark.parametrize("null", [False, True])
def test_a_report_may_miss_any_part(tmp_path, missing, null):
    given = sample(budgets=(1024,), resolutions=(168, 224), devices=DEVICES[:1])
    for key in missing:
        del given[key]
        given |= {key: None} if null else {}
    assert len(read(given, tmp_path).elements["img"]) == 3 - ("devices" in missing)
    assert len(csv_rows(tmp_path)) == len(given["cells"])


def test_cells_may_miss_all_that_is_measured(tmp_path):
    given = sample()
    for i, cell in enumerate(given["cells"].values()):
        for key in ("choose", "report", "behind", "gflops", "gflops_kept", "tokens")[i % 7 :]:
            cell.pop(key, None)
    for own in given["devices"].values():
        own["cells"] = dict(list(own["cells"].items())[::3])
    del given["devices"][DEVICES[1]]["cells"], given["devices"][DEVICES[0]]["batch"]
    assert len(read(given, tmp_path).tables[-1]) == 2 + len(given["cells"])


def test_a_report_of_one_cell(tmp_path):
    given = sample(budgets=(1024,), frames=(4,), resolutions=(224,), heads=(1,), devices=())
    assert list(given["cells"]) == ["plain-1024-4x224-h1"]
    page = read(given, tmp_path)
    assert len(page.elements["img"]) == 2
    assert page.tables[2][1] == [
        "4",
        percent(given["cells"]["plain-1024-4x224-h1"]["choose"]["top1"]),
    ]


def test_a_report_without_cells(tmp_path):
    page = read(sample(budgets=(1024,), frames=(), devices=()), tmp_path)
    assert "img" not in page.elements
    assert words(page.tables[0][1][2]) == "\u2013"
