"""Compiles native/ into the wheel (or, for an editable install, into the source tree), where a compiler is there."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_PACKAGE = Path("src/millicent/engine/kernels")


class KernelsHook(BuildHookInterface[Any]):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        del version
        root = Path(self.root)
        native = root / "native"
        if not native.is_dir():
            return
        spec = importlib.util.spec_from_file_location("millicent_kernels_build", root / _PACKAGE / "build.py")
        assert spec is not None
        assert spec.loader is not None
        builder = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(builder)
        try:
            library = builder.build(native, root / _PACKAGE)
        except builder.BuildError as error:
            self.app.display_warning(f"Millicent is installed without its compiled kernels: {error}")
            return
        # The library is loaded with ctypes: it depends on the platform, not on the Python that loads it.
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{builder.platform_tag()}"
        build_data["artifacts"].append(str(library.relative_to(root)))
