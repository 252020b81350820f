"""Train a generator: `python train_generator.py [KEY=VALUE ...]`, the same as `lorag train`.

Under `accelerate launch` the same file trains in several processes.
"""

import sys

from lorag.cli.main import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
