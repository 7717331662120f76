"""Predicting: the real policies in virtual time, with the models of ``costs`` for what takes time.

- ``event_queue``: virtual time. ``instance``, ``router``, ``cluster``: shells round the real step scheduler and the
  real dispatcher, as ``engine/loop`` and ``serve/router`` are in real time. ``decode_run`` and ``repeating_scheduler``
  time runs of equal decode steps ahead.
- ``engines``: whose rules to serve by, as settings. ``simulation``: from a specification to a
  ``run_report``. ``evaluate``: over seeds, and the search for the goodput.
"""
