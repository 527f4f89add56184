"""Stand-ins for gcloud, xpk, srun and the like: they note each call and answer as told."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests import limited

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
# All that the scripts may use besides what is recorded: no real gcloud or docker can be reached.
TOOLS = (
    "bash cat cut dirname env grep gzip head mkdir mktemp nohup pkill rm "
    "sed seq sort tail tar tee tr"
)

SOURCE = """#!{python} -SE
import json, pathlib, sys
here = pathlib.Path(__file__).resolve().parent
call = [pathlib.Path(__file__).name, *sys.argv[1:]]
with open(here / "calls.jsonl", "a") as file:
    file.write(json.dumps(call) + "\\n")
for number, rule in enumerate(json.loads((here / "scenario.json").read_text())):
    if rule["when"] in " ".join(call):
        counter = here / f"answered-{{number}}"
        before = int(counter.read_text()) if counter.exists() else 0
        counter.write_text(str(before + 1))
        out, err, status = rule["answers"][min(before, len(rule["answers"]) - 1)]
        print(out, end="")
        print(err, end="", file=sys.stderr)
        sys.exit(status)
"""


class Answer(NamedTuple):
    """What a recorder prints, and its exit status."""

    out: str = ""
    err: str = ""
    status: int = 0


class Recorders:
    """A folder of recorders, and of links to `TOOLS`, that is all of a script's PATH."""

    def __init__(self, folder: Path, names: Sequence[str]):
        self.folder = folder
        folder.mkdir()
        for tool in TOOLS.split():
            (folder / tool).symlink_to(shutil.which(tool))
        for name in names:
            self.install(name, SOURCE.format(python=sys.executable))
        self.rules = []
        self._write()

    def install(self, name: str, source: str) -> None:
        """An executable of the name and source."""
        file = self.folder / name
        file.write_text(source)
        file.chmod(0o755)

    def answer(self, when: str, *answers: Answer) -> None:
        """To calls that have `when` in them: the answers in turn, the last one for ever.

        Earlier rules go before later ones. Calls without a rule succeed and print nothing.
        """
        self.rules.append({"when": when, "answers": answers})
        self._write()

    def _write(self) -> None:
        (self.folder / "scenario.json").write_text(json.dumps(self.rules))

    def environment(self, **more: str) -> dict[str, str]:
        return {"PATH": str(self.folder), "HOME": str(self.folder.parent), **more}

    def run(self, script: str, *words: str, **environment: str) -> subprocess.CompletedProcess:
        """A script of launch/ with a command line, its environment empty but for PATH and HOME."""
        return limited.run(
            [LAUNCH / script, *words],
            env=self.environment(**environment),
            cwd=ROOT,
        )

    def words(self) -> list[list[str]]:
        """The calls so far, each the words of a command."""
        file = self.folder / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def calls(self) -> list[str]:
        """The calls so far, as one would type them."""
        return [plain(shlex.join(call)) for call in self.words()]


def plain(text: str) -> str:
    """With names in place of what differs from run to run."""
    return re.sub(r"/tmp/tmp\.\w+", "SCRATCH", text.replace(str(ROOT), "ROOT"))


def commands(done: subprocess.CompletedProcess) -> list[str]:
    """What --dry-run has printed."""
    assert done.returncode == 0, done.stderr
    return plain(done.stdout).splitlines()


def error_line(done: subprocess.CompletedProcess, status: int = 2) -> str:
    """The one line that says what is wrong."""
    assert done.returncode == status, (done.returncode, done.stderr)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]
