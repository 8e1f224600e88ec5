"""Images -> run folder: views, self-supervised methods, trainer, evaluation (needs torch)."""

import os

# Before anything here loads torch, and with it OpenMP: at the end of each operation OpenMP's threads wait for the last
# one, and by default they spin. Where the data workers or another program hold that one's core, each operation then
# lasts a time slice of the system. Measured on two cores with a third process at work: 130 images/s against 8.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
