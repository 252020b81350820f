"""Train a generator: `python train_generator.py [KEY=VALUE ...]`, the same as `lorag train`.

Several processes train one generator, each on its share of every batch:

    accelerate launch --num_processes 4 train_generator.py KEY=VALUE ...
    accelerate launch --multi_gpu --num_processes 2 train_generator.py device=cpu ...   # on CPUs, in spite of the option's name
"""

import sys

from lorag.cli.main import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
