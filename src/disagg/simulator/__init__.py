"""Predicting: the real policies in virtual time, with models of what takes time.

- ``event_queue``: virtual time. ``instance``, ``router``, ``cluster``: shells round the real step scheduler and the
  real dispatcher, as ``engine/loop`` and ``serve/router`` are in real time. ``decode_run`` and ``repeating_scheduler``
  time runs of equal decode steps ahead.
- ``latency`` and ``links``: the interfaces of what takes time. ``platform``: all that is known of a model on a device,
  from a ``profile`` (measured here), a ``roofline`` (shape and data sheet), operator ``tables``, or ``published`` fits.
- ``engines``: whose rules to serve by, as settings. ``run``: from a specification to a ``report``.
"""
