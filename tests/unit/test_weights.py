"""weights/: a version is complete or absent, and what is read is what was published."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from trueup.errors import WeightError
from trueup.weights.snapshot import Manifest, check_fits_model, manifest_of, tensor_digest
from trueup.weights.store import WeightStore, load_tensors, open_snapshot


def tensors(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(4, 6, generator=generator).to(dtype) for n in ("a", "b.weight", "c")}


@pytest.fixture
def store(tmp_path):
    return WeightStore(tmp_path / "weights")


def test_publish_and_read_back(store):
    given = tensors(dtype=torch.bfloat16)
    snapshot = store.publish(3, given)
    assert store.versions() == [3] and store.open(3) == snapshot
    read = load_tensors(store.open(3))
    assert set(read) == set(given) and all(torch.equal(read[n], given[n]) for n in given)
    assert (store.folder(3) / "COMPLETE").read_text() == snapshot.manifest.digest
    assert Manifest.from_json(snapshot.manifest.to_json()) == snapshot.manifest


def test_the_digest_depends_on_name_dtype_shape_and_bytes_but_not_on_the_version():
    base = tensors()
    digest = manifest_of(1, base).digest
    assert manifest_of(2, base).digest == digest
    changed = [
        {**base, "a": base["a"] + 1e-7 * base["a"].abs().max()},
        {**base, "a": base["a"].reshape(6, 4)},
        {**base, "a": base["a"].view(torch.int32).view(torch.float32).double()},
        {("z" if n == "a" else n): t for n, t in base.items()},
        {n: t for n, t in base.items() if n != "c"},
    ]
    assert digest not in {manifest_of(1, c).digest for c in changed}
    assert tensor_digest(torch.zeros(2)) != tensor_digest(torch.zeros(3)) != tensor_digest(torch.zeros(0))


def test_versions_are_never_overwritten_and_nan_is_never_published(store):
    store.publish(1, tensors())
    with pytest.raises(WeightError, match="already"):
        store.publish(1, tensors(1))
    with pytest.raises(WeightError, match=r"NaN or infinity in b\.weight"):
        store.publish(2, tensors() | {"b.weight": torch.full((2,), float("nan"))})
    assert store.versions() == [1]


def test_a_killed_publisher_leaves_nothing_that_could_be_read(tmp_path):
    """The process dies after each file in turn; the version is absent until COMPLETE is there, and can be published."""
    code = (
        "import os, sys, torch\nfrom pathlib import Path\nfrom trueup.weights.store import WeightStore\n"
        "root, victim = Path(sys.argv[1]), sys.argv[2]\n"
        "kill = lambda name: os._exit(9) if name == victim else None\n"
        "WeightStore(root).publish(7, {'a': torch.ones(3)}, step=kill)\n"
    )
    for victim in ("model.safetensors", "manifest.json", "COMPLETE"):
        root = tmp_path / victim
        done = subprocess.run([sys.executable, "-c", code, str(root), victim], timeout=120, check=False)
        assert done.returncode == 9
        store = WeightStore(root)
        assert store.versions() == []
        with pytest.raises(WeightError, match=r"does not exist|not published completely"):
            store.open(7)
        store.publish(7, {"a": torch.ones(3)})
        assert store.versions() == [7]


def test_a_full_disk_leaves_no_version_behind(store, monkeypatch):
    from trueup.weights import store as module

    written = module._write

    def full(path, text):
        if path.name == "COMPLETE":
            raise OSError(28, "No space left on device")
        written(path, text)

    monkeypatch.setattr(module, "_write", full)
    with pytest.raises(OSError, match="No space"):
        store.publish(1, tensors())
    assert store.versions() == [] and not any(store.root.iterdir())
    monkeypatch.undo()
    assert store.publish(1, tensors()) == store.open(1)


def test_retention_by_reference(store):
    for version in range(1, 6):
        store.publish(version, tensors(version))
    store.retain(2, "buffer")
    store.retain(2, "audit")
    store.retain(4, "buffer")
    assert store.prune() == [1, 3]
    store.release(2, "buffer")
    assert store.prune() == []
    store.release(2, "audit")
    assert store.prune() == [2] and store.versions() == [4, 5]
    with pytest.raises(WeightError, match="does not hold"):
        store.release(4, "nobody")
    with pytest.raises(WeightError, match="cannot be retained"):
        store.retain(1, "buffer")
    store.release(4, "buffer")
    assert store.prune() == [4] and store.versions() == [5]


def damage(folder, how):
    weights, manifest = folder / "model.safetensors", folder / "manifest.json"
    if how == "flipped byte":
        raw = bytearray(weights.read_bytes())
        raw[-1] ^= 1
        weights.write_bytes(raw)
    elif how == "cut short":
        weights.write_bytes(weights.read_bytes()[:-8])
    elif how == "other tensor":
        save_file({"x": torch.ones(2)}, weights)
    elif how == "other shape":
        save_file({n: t.reshape(6, 4) for n, t in tensors().items()}, weights)
    elif how == "no COMPLETE":
        (folder / "COMPLETE").unlink()
    elif how == "edited manifest":
        content = json.loads(manifest.read_text())
        content["tensors"]["a"]["digest"] = "0" * 64
        manifest.write_text(json.dumps(content))
    elif how == "another manifest":
        other = manifest_of(1, tensors(5))
        manifest.write_text(other.to_json())
    elif how == "no JSON":
        manifest.write_text("{")
    elif how == "odd entry":
        manifest.write_text(json.dumps({"schema": "trueup.weights/1", "version": 1, "tensors": {"a": 3}}))


@pytest.mark.parametrize("how", ["flipped byte", "cut short", "other tensor", "other shape", "no COMPLETE",
                                 "edited manifest", "another manifest", "no JSON", "odd entry"])  # fmt: skip
def test_damage_is_found_and_named(store, how):
    store.publish(1, tensors())
    damage(store.folder(1), how)
    with pytest.raises(WeightError) as caught:
        load_tensors(store.open(1))
    assert len(str(caught.value)) > 20 and "\n" not in str(caught.value)


def test_paths_outside_the_allowed_folder_are_refused_links_included(store, tmp_path):
    outside = WeightStore(tmp_path / "elsewhere").publish(1, tensors())
    store.publish(2, tensors())
    with pytest.raises(WeightError, match="outside"):
        open_snapshot(outside.path, allowed=store.root)
    (store.root / "v000001").symlink_to(outside.path)
    with pytest.raises(WeightError, match="outside"):
        store.open(1)
    weights = store.folder(2) / "model.safetensors"
    weights.unlink()
    os.symlink(outside.path / "model.safetensors", weights)
    with pytest.raises(WeightError, match="outside"):
        store.open(2)


def test_a_manifest_must_fit_the_model():
    manifest = manifest_of(1, tensors())
    shapes = {n: (4, 6) for n in tensors()}
    check_fits_model(manifest, shapes, torch.float32)
    check_fits_model(manifest_of(1, tensors(dtype=torch.bfloat16)), shapes, torch.float32)
    for expected, dtype, words in (
        (shapes | {"d": (1,)}, torch.float32, "lacks d"),
        ({n: (4, 6) for n in ("a", "c")}, torch.float32, "holds b.weight"),
        (shapes | {"a": (6, 4)}, torch.float32, "a has shape"),
        (shapes, torch.bfloat16, "publish the rounded"),
    ):
        with pytest.raises(WeightError, match=words):
            check_fits_model(manifest, expected, dtype)
