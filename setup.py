"""The step of the build that pyproject.toml cannot describe: model configurations and recipes go into the package.

`configs/` and `scripts/` have the one copy of them. A wheel gets it as `peft_pretraining/shipped/`, where
`peft_pretraining.models.config_files` finds it; in the tree nothing is copied, and an editable install reads the tree.
A build leaves nothing behind there: a later wheel would have the modules that are in an old `build/` and nowhere else.
"""

import atexit
import shutil
import tempfile
from pathlib import Path
from typing import ClassVar

from setuptools import Command, setup
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
SHIPPED = (
    "configs/*.json",
    "scripts/recipe.sh",
    "scripts/env.sh",
    "scripts/pretrain_c4/**/*.sh",
    "scripts/single_gpu/*.sh",
    "scripts/finetune/*.sh",
)


class BuildShipped(Command):
    """Copy the files of SHIPPED, with their folders, into the package `peft_pretraining` of the wheel."""

    description = "copy configurations and recipes into the package"
    user_options = ()
    build_lib = ""
    editable_mode = False

    def initialize_options(self) -> None:
        """Options are those of `build_py`."""
        self.build_lib = ""

    def finalize_options(self) -> None:
        """Take the folder of the build from `build_py`."""
        self.build_lib = self.get_finalized_command("build_py").build_lib

    def get_source_files(self) -> list[str]:
        """The files in the tree; an sdist has them, too."""
        return sorted(path.relative_to(ROOT).as_posix() for pattern in SHIPPED for path in ROOT.glob(pattern))

    def get_output_mapping(self) -> dict[str, str]:
        """The file in the tree by the file in the build."""
        target = Path(self.build_lib, "peft_pretraining", "shipped")
        return {str(target / name): name for name in self.get_source_files()}

    def get_outputs(self) -> list[str]:
        """The files in the build."""
        return list(self.get_output_mapping())

    def run(self) -> None:
        """Copy."""
        for target, source in {} if self.editable_mode else self.get_output_mapping().items():
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(source, target)


class Build(build):
    """The build of setuptools with the step above, in a temporary folder."""

    sub_commands: ClassVar = [*build.sub_commands, ("build_shipped", None)]

    def initialize_options(self) -> None:
        """Choose the folder; an option of the command line wins."""
        super().initialize_options()
        scratch = tempfile.TemporaryDirectory(prefix="qgalore-build-")
        atexit.register(scratch.cleanup)
        self.build_base = scratch.name


metadata = ROOT / "qgalore.egg-info"
if not metadata.exists():
    atexit.register(shutil.rmtree, metadata, ignore_errors=True)
setup(cmdclass={"build": Build, "build_shipped": BuildShipped})
