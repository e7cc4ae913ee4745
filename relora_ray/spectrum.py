"""python -m relora_ray.spectrum, as `relora-ray spectrum` was called first."""

import sys

from relora_ray.study.spectrum import main

if __name__ == "__main__":
    sys.exit(main())
