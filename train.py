"""Train a run: python train.py --preset quick. The same command again continues a run that was stopped."""

import sys

from ms_diffusion.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
