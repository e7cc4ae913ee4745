"""python -m relora_ray.status, as `relora-ray status` was called first."""

import sys

from relora_ray.commands.status import main

if __name__ == "__main__":
    sys.exit(main())
