"""python -m relora_ray.export, as `relora-ray export` was called first."""

import sys

from relora_ray.commands.export import main

if __name__ == "__main__":
    sys.exit(main())
