"""Run the cases of a kind. A case is (kind, seed, number), and is the same wherever it runs."""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.fuzz.kinds import KINDS, remembered_outlines
from tests.fuzz.mutations import mutate, plant
from tests.fuzz.watch import watched


@dataclass(frozen=True)
class Outcome:
    """The outcome of a case; `finding` is None where it is right."""

    kind: str
    seed: int
    number: int
    file: str
    damage: str
    outcome: str
    finding: str | None

    def __str__(self) -> str:
        case = f"--kind {self.kind!r} --seed {self.seed} --case {self.number}"
        return f"{case}: {self.damage} of {self.file}, {self.outcome}\n{self.finding}"


class Input:
    """A valid input in a directory of its own, which `restored` puts back after every case."""

    def __init__(self, kind: str, home: Path):
        self.kind, self.name = KINDS[kind], kind
        self.directory = home / "input"
        self.directory.mkdir()
        self.kind.make(self.directory)
        paths = [path for path in self.directory.rglob("*") if path.is_file()]
        self._contents = {path.relative_to(self.directory): path.read_bytes() for path in paths}
        plant(self.directory)
        self._files = [self._matching(pattern) for pattern in self.kind.files]
        assert all(self._files), (kind, self.kind.files)

    def _matching(self, pattern: str) -> list[Path]:
        return sorted(path for path in self._contents if path.match(pattern))

    def run(self, seed: int, number: int, *, keep: bool = False) -> Outcome:
        """Damage a file, read the input, and put the file back (not with `keep`)."""
        random = Random(f"{self.name}/{seed}/{number}")
        name = random.choice(random.choice(self._files))
        os.environ["GLOBE_VERIFY"] = str(number % 2)  # hashes refuse nearly all damage: half of the cases go without
        damage = mutate(random, self.directory / name, is_given=self.kind.is_given)
        try:
            writable = self.directory if self.kind.writes else None
            outcome, finding = watched(lambda: self.kind.read(self.directory), self.directory, writable=writable)
        finally:
            del os.environ["GLOBE_VERIFY"]
            if not keep:
                self._put_back(name)
        return Outcome(self.name, seed, number, str(name), damage, outcome, finding)

    def restore(self) -> None:
        """Put every file back."""
        shutil.rmtree(self.directory)
        self.directory.mkdir()
        for each, content in self._contents.items():
            (self.directory / each).parent.mkdir(exist_ok=True)
            (self.directory / each).write_bytes(content)
        plant(self.directory)

    def _put_back(self, name: Path) -> None:
        if self.kind.writes:
            self.restore()
            return
        path = self.directory / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        path.write_bytes(self._contents[name])


@contextmanager
def opened(kind: str) -> Iterator[Input]:
    """Make the valid input of a kind, on a disk in memory where there is one."""
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="globe-fuzz-", dir=memory) as home:
        yield Input(kind, Path(home))


def run_cases(valid: Input, seed: int, numbers: Iterable[int]) -> Iterator[Outcome]:
    """Run the cases with these numbers. Raises AssertionError when the input is refused before any damage."""
    with remembered_outlines() if valid.kind.keeps_config else nullcontext():
        writable = valid.directory if valid.kind.writes else None
        outcome, finding = watched(lambda: valid.kind.read(valid.directory), valid.directory, writable=writable)
        assert (outcome, finding) == ("works", None), f"{valid.name} before any damage: {outcome} {finding}"
        if valid.kind.writes:
            valid.restore()
        for number in numbers:
            yield valid.run(seed, number)
