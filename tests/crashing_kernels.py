"""A module whose variants cannot even be listed in a compiling process: that ends at once, as in a compiler's crash."""

import os
from multiprocessing import parent_process


def variants(arch) -> list:
    if parent_process() is not None:
        os._exit(3)
    return []
