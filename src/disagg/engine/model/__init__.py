"""The computed model: weights, decoder and sampler over the kernels of one backend."""
