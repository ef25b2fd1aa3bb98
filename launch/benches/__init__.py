"""The measurements of launch/bench.py, one file each; every one runs its peers in turn in the same process."""
