"""What every test needs: frameworks told that there is no GPU, before anything imports them."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
