"""One live instance: the loop around the step scheduler, the executor, the model and its kernels."""
