"""The arithmetic of a decoder layer over paged KV blocks: one interface, a native CPU backend and a PyTorch backend."""
