"""`bitlab bench`: the kernels next to the limits of this machine and to peers, all measured in one run, in turns."""
