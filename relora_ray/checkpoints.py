"""python -m relora_ray.checkpoints, as `relora-ray checkpoints` was called first."""

import sys

from relora_ray.commands.checkpoints import main

if __name__ == "__main__":
    sys.exit(main())
