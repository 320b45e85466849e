"""A run on disk: a folder that anyone can read without this package.

    run.json                     versions, settings, seeds, content hashes, timings, memory, trust figures
    nodes/ edges/ meta/*.parquet shards, one for each piece of work
    flags.parquet                one table
    graph.json, index.html       text

1. Every file is written under a temporary name in the folder, flushed, and renamed: a reader sees a whole
   file or none, however the writer ends.
2. A run is known by its settings. Creating it again with the same settings resumes: work whose shard exists
   is skipped. Other settings are refused.
3. run.json is strict JSON: figures that are not numbers (nan, inf) are stored as null.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import platform
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import polars as pl

from mediation.errors import MediationError

PACKAGES = ("latent-mediation", "torch", "transformers", "sae_lens", "nnsight", "polars")
PROMPTS_FILE = "prompts.jsonl"  # a run keeps the prompts it was made from
_FORMAT = "latent-mediation run 2"


class Run:
    """One run's folder. Make it with `Run.create` or `Run.open`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: str | Path, settings: Mapping[str, Any], *, resume: bool = True) -> Run:
        """Start a run in `path`, or resume the one there if its settings are the same.

        `settings` maps names to JSON-able values: all that decides the results, seed and content hashes too.
        MediationError: the folder holds another run (any run, if not `resume`) or other files, or cannot be
        written.
        """
        run, wanted = cls(Path(path)), _plain(settings)
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            # A run killed while it wrote its first file holds nothing but that file's temporary name.
            occupied = any(not file.match(".run.json.*.tmp") for file in run.path.iterdir())
        except OSError as error:
            raise _unwritable(run.path, error) from error
        if not occupied:
            run._write_info(
                {
                    "format": _FORMAT,
                    "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                    "settings": wanted,
                    "versions": _versions(),
                    "timings": {},
                    "peak_memory_mb": peak_memory_mb(),
                }
            )
            return run
        if not (run.path / "run.json").exists():
            raise MediationError(f"{run.path} holds files that are not a run; choose an empty or new folder.")
        if not resume:
            raise MediationError(f"{run.path} already holds a run; choose another folder.")
        changed = _differences(run.settings, wanted)
        if changed:
            raise MediationError(
                f"{run.path} holds a run with other settings ({changed}); use the same to resume it, or another folder."
            )
        run._sweep()
        return run

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """An existing run. MediationError when the folder holds none or its run.json cannot be read."""
        run = cls(Path(path))
        if not (run.path / "run.json").is_file():
            raise MediationError(f"{path} is not a run: it has no run.json; give the folder that a trace wrote.")
        _ = run.info
        return run

    @property
    def info(self) -> dict[str, Any]:
        """run.json as it is on disk now."""
        file = self.path / "run.json"
        try:
            info = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise MediationError(f"{file} cannot be read ({error}); start the run again in a new folder.") from error
        if not isinstance(info, dict) or info.get("format") != _FORMAT or not isinstance(info.get("settings"), dict):
            raise MediationError(f"{file} is not the run.json of a run ({_FORMAT}); start again in a new folder.")
        return info

    @property
    def settings(self) -> dict[str, Any]:
        """The settings the run was created with."""
        return self.info["settings"]

    def record(self, **figures: Any) -> None:
        """Merge figures into run.json, mappings key by key; peak memory is kept up to date."""
        info = self.info
        _merge(info, _plain(figures))
        info["peak_memory_mb"] = max(info.get("peak_memory_mb") or 0.0, peak_memory_mb())
        self._write_info(info)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds the block took to `timings[name]`; a block that raises is not counted."""
        start = time.perf_counter()
        yield
        before = self.info.get("timings", {}).get(name, 0.0)
        self.record(timings={name: before + time.perf_counter() - start})

    def write_shard(self, kind: str, name: str, frame: pl.DataFrame) -> Path:
        """Write `{kind}/{name}.parquet` whole; an earlier shard of that name is replaced."""
        return write_frame(self._shard(kind, name), frame)

    def has_shard(self, kind: str, name: str) -> bool:
        """Whether that piece of work is done."""
        return self._shard(kind, name).exists()

    def write_table(self, name: str, frame: pl.DataFrame) -> Path:
        """Write `{name}.parquet`, a table of one file such as flags."""
        return write_frame(self.path / f"{_checked(name)}.parquet", frame)

    def has(self, kind: str) -> bool:
        """Whether there is anything of that kind to `read`."""
        return bool(self._files(kind))

    def read(self, kind: str) -> pl.DataFrame:
        """All shards of a kind, one below the other in the order of their names, or the table of that name.

        MediationError when there are none, or one is damaged or has other columns than the rest.
        """
        files = self._files(kind)
        if not files:
            raise MediationError(f"The run in {self.path} has no {kind} yet; run the step that writes them first.")
        try:
            return pl.concat([pl.read_parquet(file) for file in files], how="vertical_relaxed")
        except (OSError, pl.exceptions.PolarsError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise MediationError(f"The {kind} in {self.path} cannot be read ({reason}); run it again.") from error

    def write_text(self, name: str, text: str, *, folder: str = "") -> Path:
        """Write a UTF-8 text file such as graph.json or index.html, in a folder of the run if one is named."""
        place = self.path / _checked(folder) if folder else self.path
        return _write(place / _checked(name), text.encode())

    def _sweep(self) -> None:
        """Remove what a killed writer left behind."""
        try:
            for leftover in [*self.path.glob(".*.tmp"), *self.path.glob("*/.*.tmp")]:
                leftover.unlink()
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def _shard(self, kind: str, name: str) -> Path:
        return self.path / _checked(kind) / f"{_checked(name)}.parquet"

    def _files(self, kind: str) -> list[Path]:
        shards = sorted((self.path / _checked(kind)).glob("[!.]*.parquet"), key=lambda file: file.stem)
        table = self.path / f"{kind}.parquet"
        return shards or ([table] if table.exists() else [])

    def _write_info(self, info: dict[str, Any]) -> None:
        _write(self.path / "run.json", json.dumps(info, indent=2, allow_nan=False).encode())


def write_frame(file: Path, frame: pl.DataFrame) -> Path:
    """A table as Parquet, whole or not at all. MediationError when it cannot be written."""
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    return _write(file, buffer.getvalue())


def _write(file: Path, data: bytes) -> Path:
    """Step 1."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(exist_ok=True)
        try:
            with temporary.open("wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _unwritable(file, error) from error
    return file


def peak_memory_mb() -> float:
    """The most memory this process has held so far, in MB."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage, whose peak on Linux starts at that of the process this one was forked from.
        high = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if high:
            return int(high[1]) / 2**10
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _plain(value: Any) -> Any:
    """`value` as JSON types: arrays become lists, dataclasses objects, paths text, and nan and inf null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path | str):  # also members of a StrEnum
        return str(value)
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    return ", ".join(f"{name}: {old.get(name)!r} there, {new.get(name)!r} here" for name in names)


def _merge(info: dict[str, Any], figures: dict[str, Any]) -> None:
    for name, value in figures.items():
        if isinstance(value, dict) and isinstance(info.get(name), dict):
            _merge(info[name], value)
        else:
            info[name] = value


def _checked(name: str) -> str:
    """A name that stays one file inside the run."""
    if not re.fullmatch(r"\w[\w.\-]*", name):
        raise MediationError(f"{name!r} cannot name a file of a run; use letters, digits, '.', '-' and '_'.")
    return name


def _unwritable(file: Path, error: OSError) -> MediationError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MediationError(f"No room on the disk to write {file}; free some and run the same command to resume.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return MediationError(f"No permission to write {file}; choose another folder or change its permissions.")
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return MediationError(f"{file} cannot be written because a file stands where a folder must be; choose another.")
    return MediationError(f"Cannot write {file} ({error.strerror or error}); choose another folder.")
