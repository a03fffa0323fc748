"""Weight versions on disk: `vNNNNNN/` with model.safetensors, manifest.json and COMPLETE, which is written last.

A version without COMPLETE does not exist. Only safetensors are read, only from under a folder that was allowed, and
what was read is compared with the manifest byte for byte before anybody sees it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trueup.errors import WeightError
from trueup.weights.snapshot import (
    COMPLETE_FILE,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    Manifest,
    WeightSnapshot,
    check_fits_model,
    manifest_of,
    tensor_digest,
)

_FOLDER = re.compile(r"v(\d{6,})")
MAX_MANIFEST_BYTES = 64 * 2**20


def open_snapshot(path: Path, *, allowed: Path | None = None) -> WeightSnapshot:
    """Read the manifest of a published version; no tensor is loaded.

    Raises WeightError when the folder lies outside `allowed` (links followed), was not finished, or its manifest is
    damaged.
    """
    try:
        folder, manifest, complete = _read_manifest(path, None if allowed is None else allowed.resolve())
    except (OSError, RuntimeError, UnicodeError, ValueError) as error:
        if isinstance(error, WeightError):
            raise
        raise WeightError(f"{str(path)[:200]} cannot be read: {error}"[:400]) from None
    if complete != manifest.digest:
        raise WeightError(f"{path}: {COMPLETE_FILE} names another manifest than {MANIFEST_FILE} holds")
    return WeightSnapshot(version=manifest.version, path=folder, manifest=manifest)


def _read_manifest(path: Path, allowed: Path | None) -> tuple[Path, Manifest, str]:
    folder = path.resolve()
    if allowed is not None and not folder.is_relative_to(allowed):
        raise WeightError(f"{path} is outside the folder that weights may be loaded from")
    if not folder.is_dir():
        raise WeightError(f"weight folder {path} does not exist")
    for name in (COMPLETE_FILE, MANIFEST_FILE, WEIGHTS_FILE):
        file = folder / name
        if not file.is_file():
            raise WeightError(f"{path} has no {name}: the version was not published completely")
        if allowed is not None and not file.resolve().is_relative_to(allowed):
            raise WeightError(f"{file} leads outside the folder that weights may be loaded from")
    manifest_file = folder / MANIFEST_FILE
    if manifest_file.stat().st_size > MAX_MANIFEST_BYTES:
        raise WeightError(f"{manifest_file} is larger than {MAX_MANIFEST_BYTES} bytes")
    manifest = Manifest.from_json(manifest_file.read_text(encoding="utf-8"))
    return folder, manifest, (folder / COMPLETE_FILE).read_text(encoding="utf-8").strip()


def open_update(
    path: Path,
    *,
    allowed: Path | None,
    served: Mapping[int, str],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
) -> WeightSnapshot:
    """Read the manifest of a version that an engine is to load; no tensor is loaded.

    `served` maps the numbers it served before to their digests; `shapes` and `dtype` are its model's. Raises
    WeightError as `open_snapshot` does, for a number that meant other weights, and for tensors of another model.
    """
    snapshot = open_snapshot(path, allowed=allowed)
    digest = snapshot.manifest.digest
    if served.get(snapshot.version, digest) != digest:
        raise WeightError(
            f"version {snapshot.version} was served before with other weights: a stamp must name one set of "
            "weights; publish under a new number"
        )
    check_fits_model(snapshot.manifest, shapes, dtype)
    return snapshot


def load_tensors(snapshot: WeightSnapshot) -> dict[str, Tensor]:
    """Load a version into fresh memory and verify each tensor's shape, dtype, digest and finiteness.

    Raises WeightError with the name of the first tensor that is not what the manifest says.
    """
    try:
        # Copies: the file's pages are not aligned for vector kernels, and belong to whoever may write the file.
        tensors = {n: t.clone() for n, t in load_file(snapshot.path / WEIGHTS_FILE).items()}
    except (OSError, safetensors.SafetensorError, ValueError) as error:
        raise WeightError(f"{snapshot.path / WEIGHTS_FILE} is damaged: {error}") from None
    if set(tensors) != set(snapshot.manifest.tensors):
        odd = sorted(set(tensors) ^ set(snapshot.manifest.tensors))
        raise WeightError(f"{snapshot.path / WEIGHTS_FILE} and its manifest differ in {odd[0]} ({len(odd)} tensors)")
    for name, tensor in tensors.items():
        entry = snapshot.manifest.tensors[name]
        if tuple(tensor.shape) != entry.shape or str(tensor.dtype) != f"torch.{entry.dtype}":
            raise WeightError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, its manifest says {entry}")
        if tensor_digest(tensor) != entry.digest:
            raise WeightError(f"{name} has not the digest its manifest names: the file was damaged or changed")
        if not bool(torch.isfinite(tensor).all()):
            raise WeightError(f"{name} holds NaN or infinity")
    return tensors


class WeightStore:
    """The versions of one run. One process publishes; versions are kept while a holder refers to them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._holders: dict[int, set[str]] = defaultdict(set)

    def folder(self, version: int) -> Path:
        """Return where a version lies or would lie."""
        return self.root / f"v{version:06d}"

    def versions(self) -> list[int]:
        """Return the complete versions, ascending."""
        found = []
        for path in self.root.glob("v*"):
            match = _FOLDER.fullmatch(path.name)
            if match and (path / COMPLETE_FILE).is_file():
                found.append(int(match[1]))
        return sorted(found)

    def publish(
        self,
        version: int,
        tensors: Mapping[str, Tensor],
        *,
        files: Mapping[str, bytes] | None = None,
        step: Callable[[str], None] = lambda name: None,
    ) -> WeightSnapshot:
        """Write a version so that it is either complete or absent, even if the process is killed, and return it.

        `files` are further files by name. `step` is called with the name of each file once it is on disk. Raises
        WeightError when the version exists or the tensors are not finite; OSError (disk full) leaves no version behind.
        """
        target = self.folder(version)
        if (target / COMPLETE_FILE).is_file():
            raise WeightError(f"version {version} was published already; versions are never overwritten")
        manifest = manifest_of(version, tensors)
        work = self.root / f".{target.name}.part"
        for leftover in (work, target):
            if leftover.exists():
                shutil.rmtree(leftover)
        work.mkdir(parents=True)
        try:
            for name, content in (files or {}).items():
                _write(work / name, content)
            contents = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
            save_file(contents, work / WEIGHTS_FILE, metadata={"format": "pt"})
            _sync(work / WEIGHTS_FILE)
            step(WEIGHTS_FILE)
            _write(work / MANIFEST_FILE, manifest.to_json().encode())
            step(MANIFEST_FILE)
            _write(work / COMPLETE_FILE, manifest.digest.encode())
            _sync(work)
            step(COMPLETE_FILE)
            os.replace(work, target)
            _sync(self.root)
        except safetensors.SafetensorError as error:  # how its writer says that the disk is full
            shutil.rmtree(work, ignore_errors=True)
            raise OSError(str(error)) from None
        except OSError:
            shutil.rmtree(work, ignore_errors=True)
            raise
        return WeightSnapshot(version=version, path=target.resolve(), manifest=manifest)

    def open(self, version: int) -> WeightSnapshot:
        """Return a published version. Raises WeightError when it is absent, incomplete or damaged."""
        snapshot = open_snapshot(self.folder(version), allowed=self.root)
        if snapshot.version != version:
            raise WeightError(f"{snapshot.path} holds version {snapshot.version}, not {version}")
        return snapshot

    def retain(self, version: int, holder: str) -> None:
        """Keep a version until the same holder releases it. Raises WeightError when it is not there."""
        if version not in self.versions():
            raise WeightError(f"version {version} cannot be retained: it is not in {self.root}")
        self._holders[version].add(holder)

    def release(self, version: int, holder: str) -> None:
        """Give up a holder's claim. Raises WeightError when it had none, which is a bookkeeping error."""
        if holder not in self._holders.get(version, set()):
            raise WeightError(f"{holder!r} does not hold version {version}")
        self._holders[version].discard(holder)
        if not self._holders[version]:
            del self._holders[version]

    def prune(self) -> list[int]:
        """Delete versions that nobody holds, but never the newest; return what was deleted."""
        gone = [v for v in self.versions()[:-1] if v not in self._holders]
        for version in gone:
            (self.folder(version) / COMPLETE_FILE).unlink()
            shutil.rmtree(self.folder(version))
        return gone

    def keep_newest(self, count: int, holder: str) -> list[int]:
        """Have a holder keep the newest `count` versions and no others, and prune; return what was deleted."""
        kept = self.versions()[-count:]
        for version in kept:
            self.retain(version, holder)
        for version in [v for v, holders in self._holders.items() if holder in holders and v not in kept]:
            self.release(version, holder)
        return self.prune()


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
