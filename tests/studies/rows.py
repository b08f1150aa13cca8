"What the studies' scripts share: rows in nbs/results, to which several processes may add, and the weights that ship."
import shutil
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from filelock import FileLock

from dreamer4_nb.core import JsonDict, write_json
from dreamer4_nb.inputs import read_json
from dreamer4_nb.runs.judge import machine

RESULTS = Path(__file__).parents[2] / "nbs" / "results"


@dataclass(frozen=True)
class Table:
    """Lists of rows in a file of results, `rows` and others, and what is noted beside them.

    path: of the file; key: of the table in it, or empty if the file holds nothing else."""
    path: Path
    key: str = ""

    def _whole(self) -> JsonDict:
        return read_json(self.path, "put back a copy of it") if self.path.exists() else {}

    def read(self) -> JsonDict:
        "The table, at least an empty list `rows`."
        whole = self._whole()
        return {"rows": []} | (whole.get(self.key, {}) if self.key else whole)

    def has(self, **values: Any) -> bool:
        "Whether a row has these values."
        return any(all(row[name] == value for name, value in values.items()) for row in self.read()["rows"])

    def add(self, notes: JsonDict, **lists: list[JsonDict]) -> None:
        "Adds to the lists, and sets the notes."
        with FileLock(self.path.with_name(f".{self.path.stem}.lock")):
            whole = self._whole()
            table = whole.setdefault(self.key, {}) if self.key else whole
            table.update(notes, machine=machine())
            for name, rows in lists.items():
                table[name] = table.get(name, []) + rows
            write_json(self.path, whole)


def copy_shipped(folder: Path, *names: str) -> None:
    "Copies weights that ship into the folder of a run, unless it has its own."
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        target = folder / f"{name}.safetensors"
        if not target.exists():
            shutil.copy(str(files("dreamer4_nb") / "assets" / f"tiny_{name}.safetensors"), target)
