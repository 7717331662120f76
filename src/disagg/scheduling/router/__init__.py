"""The core of the router: everything between what it is told and what it does, without token values."""
