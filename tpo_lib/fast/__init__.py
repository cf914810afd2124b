"""The same numbers as the core in less time and memory. The core never imports it.

fused.py is the step, tiles.py what it is made of, prefix.py reads a pair's prompt once, frozen.py what frozen models say once;
path.py turns them on. encode.py makes token ids of long tables once, table.py is what it makes.
"""

from tpo_lib.fast.fused import pair_loss as pair_loss
from tpo_lib.fast.path import FastPath as FastPath
