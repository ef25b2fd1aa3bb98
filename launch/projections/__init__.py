"""What a long training takes, projected from seconds of a step: launch/plan.py and `bench.py savings` are made of it.

schedule.py: epochs at equal widths and image sizes -> steps, seconds, hours
network.py: a full network, its cost at any widths and image size
ramps.py: the widths of each epoch, as a method would cut fresh or given weights
variants.py: what a recipe may be trained as, and what each of these takes
memory.py: what a step holds in a device's memory
"""
