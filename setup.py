"""Compiled kernels in wheels: plain shared libraries, one per level of x86-64. Without a compiler there are none."""

import os
import runpy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

FLAGS = runpy.run_path("src/dqrm/kernels/flags.py")
SOURCE = f'-DDQRM_SOURCE="{FLAGS["digest"](FLAGS["SOURCES"])}"'


def library(level: str, flags: tuple[str, ...]) -> Extension:
    sources = [str(Path("src/dqrm/kernels", file.name)) for file in FLAGS["SOURCES"]]
    # OpenMP's functions stay undefined: torch has loaded its own by then, and its threads are shared.
    arguments = [*FLAGS["FLAGS"], *flags, SOURCE, *FLAGS["OPENMP"]]
    return Extension(
        f"dqrm.kernels._{level}", sources, extra_compile_args=arguments, libraries=["m"], optional=True,
        depends=["src/dqrm/kernels/common.h"],
    )  # fmt: skip


class Libraries(build_ext):
    def run(self) -> None:
        if self.editable_mode:  # sources will change: they are compiled at first use
            self.extensions = []
        super().run()

    def build_extension(self, ext: Extension) -> None:
        # Objects of different flags must not have one name.
        temporary, self.build_temp = self.build_temp, os.path.join(self.build_temp, ext.name)
        try:
            super().build_extension(ext)
        except CompileError:
            ext.extra_compile_args = [*ext.extra_compile_args[: -len(FLAGS["OPENMP"])], *FLAGS["WITHOUT_OPENMP"]]
            super().build_extension(ext)
        finally:
            self.build_temp = temporary

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]  # no Python API: any version of Python


setup(
    ext_modules=[library(level, flags) for level, flags in FLAGS["LEVELS"].items()],
    cmdclass={"build_ext": Libraries, "bdist_wheel": Wheel},
)
