"""What pip calls to build quire (PEP 517): setuptools, with the compiled library if it can be made.

The library has no part of Python in it, so one wheel of a platform serves every Python. Without a
compiler, or when it fails, there is the wheel of every platform: an install never fails for it.
"""

import importlib.metadata
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

from . import build

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + _headers()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    needed = [] if build.is_current(build.LIBRARY) else _headers()
    return build_meta.get_requires_for_build_editable(config_settings) + needed


def _headers() -> list[str]:
    """jaxlib in the range of jax's, for its headers: 85 MB, so only where it will be used."""
    project = tomllib.loads((build.HERE.parent / "pyproject.toml").read_text())["project"]
    found = [Requirement(text) for text in project["dependencies"]]
    (jax,) = [requirement for requirement in found if requirement.name == "jax"]
    outside = importlib.metadata.distributions(name="jaxlib", path=[sysconfig.get_path("platlib")])
    is_there = any(jax.specifier.contains(found.version) for found in outside)
    if build.find_compiler() is None or (is_there and build.find_headers()):
        return []
    return [f"jaxlib{jax.specifier}"]


class BuildPy(build_py):
    """build_py, with the library: in place if the install is editable."""

    def run(self) -> None:
        super().run()
        try:
            build.build(self.library())
        except (build.CannotBuild, OSError) as error:
            print(f"quire: the C++ kernels were not built: {error}", file=sys.stderr)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        made = self.library()
        return [*super().get_outputs(include_bytecode), *([str(made)] if made.is_file() else [])]

    def get_source_files(self) -> list[str]:
        root = build.HERE.parent
        sources = sorted(p for p in build.SOURCES.iterdir() if p.is_file())
        return [*super().get_source_files(), *(str(p.relative_to(root)) for p in sources)]

    def library(self) -> Path:
        if self.editable_mode:
            return build.LIBRARY
        return Path(self.build_lib, "quire", "cpu_kernels", build.LIBRARY.name)


class BdistWheel(bdist_wheel):
    """bdist_wheel, for this platform if there is a library."""

    def run(self) -> None:
        self.run_command("build")  # now, as what follows depends on whether there is a library
        self.root_is_pure = not self._has_library()
        # Which of the two folders of an environment the files are for is asked of the distribution.
        self.distribution.has_ext_modules = self._has_library  # type: ignore[method-assign]
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        if not self._has_library():
            return super().get_tag()
        self.root_is_pure = False
        return "py3", "none", super().get_tag()[2]

    def _has_library(self) -> bool:
        command = self.get_finalized_command("build_py")
        assert isinstance(command, BuildPy)
        return command.library().is_file()
