"""The engine's forward pass against the limits of the machine it runs on."""
