"""One op family a file: what it computes, its autograd rule, its registration.

Beside each, `<family>_triton.py` holds the kernels and their launchers (imported only when they
run, so that the library imports where Triton does not exist) and `<family>_torch.py` the chunked
torch backend.
"""
