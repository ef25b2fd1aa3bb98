"""One run: ranks, devices, files, clocks. The only floor where CUP, data and DDP meet."""
