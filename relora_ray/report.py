"""python -m relora_ray.report, as `relora-ray report` was called first."""

import sys

from relora_ray.commands.report import main

if __name__ == "__main__":
    sys.exit(main())
