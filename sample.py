"""Draw samples from a run: python sample.py runs/quick --num 64 --out grid.png --gif denoise.gif."""

import sys

from ms_diffusion.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
