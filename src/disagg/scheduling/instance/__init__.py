"""The core of an instance: everything between what it is told and what it does, without token values."""
