"""Predicting: virtual time, latency and link models, and shells that drive the real policies with them."""
