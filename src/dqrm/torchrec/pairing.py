"""Whether TorchRec and FBGEMM are there, and FBGEMM goes with the torch that is: each release is built for one."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from dqrm.errors import UserError

TORCHREC = "1.9.2"  # the release that the tests ran with
_FBGEMM = ("fbgemm-gpu-cpu", "fbgemm-gpu")


def fbgemm_for(torch_version: str) -> str:
    """The release series of FBGEMM that is built for a torch: '1.8' for '2.13.0+cpu'.

    FBGEMM 1.N goes with torch 2.(N + 5), from 1.0 on (FBGEMM's table of compatible releases).
    """
    return f"1.{_minor(torch_version) - 5}"


def check() -> None:
    """Import TorchRec.

    Raises:
        UserError: TorchRec or FBGEMM is missing, FBGEMM is built for another torch, or they cannot be imported. The
            sentence says what to install.
    """
    torch_version = version("torch")
    series = fbgemm_for(torch_version)
    pair = (
        f"with torch {torch_version} install the pair fbgemm-gpu-cpu {series} and torchrec {TORCHREC}: "
        f"pip install 'dqrm[torchrec]' 'fbgemm-gpu-cpu=={series}.*' && pip install --no-deps torchrec=={TORCHREC}"
    )
    found = {name: release for name in _FBGEMM if (release := _installed(name))}
    if _installed("torchrec") is None or not found:
        missing = "torchrec" if found else "FBGEMM" if _installed("torchrec") else "torchrec and FBGEMM"
        raise UserError(f"dqrm.torchrec needs {missing}, not installed here; {pair}")
    for name, release in found.items():
        if not release.startswith(f"{series}."):
            other = f"2.{_minor(release) + 5}"
            raise UserError(
                f"{name} is {release}, which is built for torch {other}, but torch is {torch_version}; {pair}"
            )
    try:
        import_module("torchrec")
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        # AttributeError: operators of FBGEMM that are missing since its library could not be loaded.
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"torchrec {version('torchrec')} cannot be imported ({first}); {pair}") from error


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _minor(release: str) -> int:
    return int(release.split(".")[1])
