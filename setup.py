"""Builds sidestep: maps the top-level folders to import names; CMake and ninja build the extension.

CMakeLists.txt describes the native build; nothing about it is decided here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD_JOBS = "2"

# Folder -> import name. Sub-packages are found, so that a new one is never forgotten.
FOLDERS = {
    "python/sidestep": "sidestep",
    "runtime": "sidestep.runtime",
    "triton_kernels": "sidestep.kernels",
}


def packages() -> list[str]:
    """Returns every importable package under the mapped folders."""
    found = []
    for folder, name in FOLDERS.items():
        if not (ROOT / folder).is_dir():
            continue
        found.append(name)
        found += [f"{name}.{package}" for package in find_packages(str(ROOT / folder))]
    return found


class CMakeBuild(build_ext):
    """Builds `sidestep._native` with CMake and ninja."""

    def build_extension(self, ext: Extension) -> None:
        """Configures and builds, and leaves the extension where setuptools expects it."""
        import pybind11

        target = (Path.cwd() / self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        cmake = shutil.which("cmake")
        ninja = shutil.which("ninja")
        if cmake is None or ninja is None:
            raise RuntimeError("building sidestep needs cmake and ninja: pip install cmake ninja")
        configure = [
            cmake,
            f"-S{ROOT}",
            f"-B{build}",
            "-GNinja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            "-DCMAKE_BUILD_TYPE=Release",
            "-DSIDESTEP_PYTHON=ON",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        subprocess.run(configure, check=True)
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", BUILD_JOBS)
        subprocess.run(
            [cmake, "--build", str(build), "--target", "_native", "-j", jobs], check=True
        )
        shutil.copy2(build / target.name, target)


setup(
    package_dir={name: folder for folder, name in FOLDERS.items()},
    packages=packages(),
    package_data={
        "sidestep": ["models/**", "py.typed"],
        "sidestep.runtime": ["methods/criteria/*.safetensors"],
    },
    ext_modules=[Extension("sidestep._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
