"""What pyproject.toml has no words for: `configs/` goes into the wheel, as `relora_ray/configs/`."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # a checkout has them beside the package
            shutil.copytree("configs", Path(self.build_lib, "relora_ray", "configs"), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithConfigs})
