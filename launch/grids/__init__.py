"""What launch/compare.py is made of: a file that names methods and controls, and the runs that it stands for.

grid.py: the YAML file -> entries, settings, seeds
jobs.py: these -> runs, with the configuration of each and what it needs finished first
stages.py: what a run consists of: commands before it, and the training
disk.py: what of a run is there already, and what it cost
runner.py: runs what is missing, some at a time
board.py: what is shown meanwhile
estimate.py: what the whole will cost, from measured steps
"""
