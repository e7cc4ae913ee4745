"""python -m relora_ray.ablations, as `relora-ray ablations` was called first."""

import sys

from relora_ray.study.ablations import main

if __name__ == "__main__":
    sys.exit(main())
